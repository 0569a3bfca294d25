"""Ranks models and baselines over the test positions, and says how sure the differences are. It may import `session_model` and
`baselines`, and trains nothing.
"""
