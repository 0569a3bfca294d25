"""The session model: scores all items for a session, in PyTorch and, for one session, in numpy. It reads and writes no files but its own
settings and knows nothing of FAISS, metrics or HTTP.
"""
