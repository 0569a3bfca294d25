"""Item embeddings and sessions in, ranked items out."""
