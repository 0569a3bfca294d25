"""Ranks models and baselines over test cases, and tests the significance of their differences. It may import `session_model` and
`baselines`, and trains nothing.
"""
