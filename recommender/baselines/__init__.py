"""The baselines of the session model: counts, nearest sessions, and neural models of the literature. It may import
`session_model` only, and no metric.
"""
