"""Trains session models on embeddings and sessions and publishes one: `tpad train-sbr`, `tpad index`. It does not serve, and runs no
experiments over many models.
"""
