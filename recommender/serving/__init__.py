"""`tpad recommend` and `tpad serve`: item_ids in, ranked items with reasons out. It may import `session_model` and `retrieval`, and
loads no PyTorch to answer a single session.
"""
