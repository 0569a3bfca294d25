"""What the session model is compared with: counts, nearest sessions, and neural models of the literature. It may import
`session_model` only, and no metric.
"""
