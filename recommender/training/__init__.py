"""`tpad train-sbr`: trains the session models on embeddings and sessions, and publishes one. It serves nothing, and runs no
experiment over many models.
"""
