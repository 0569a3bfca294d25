"""Items and sessions in, item embeddings out."""
