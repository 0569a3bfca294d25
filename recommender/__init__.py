"""Turns item embeddings and sessions into ranked items: `training` makes a session model, `serving` answers with it.

Imports run one way: `session_model <- {baselines, retrieval}`, `baselines <- metrics`, `{metrics, retrieval} <- training <-
experiments`, `serving` over session_model and retrieval, `report` over serving and metrics. Of `pipeline` only `core`, `data` and
`objectives` may be imported. A test enforces it (tests/test_layout.py).
"""
