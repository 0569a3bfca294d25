"""The session model: sessions in, scores of all items out, in PyTorch and, for one session, in numpy. It reads and writes no files but
its own settings and knows nothing of FAISS, metrics or HTTP.
"""
