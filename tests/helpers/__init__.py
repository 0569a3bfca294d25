"""What several test files share: processes, runs, backbones, items, embeddings, a server."""
