"""Settings, files, artifacts and checkpoints: what every command needs, whatever it works on. It imports nothing of the other
packages and knows nothing of items, sessions or models.
"""
