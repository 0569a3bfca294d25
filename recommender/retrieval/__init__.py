"""Makes a trained session model searchable: FAISS indexes over the item vectors, exact scoring of the candidates, and the published files.
It may import `session_model` only, and trains nothing.
"""
