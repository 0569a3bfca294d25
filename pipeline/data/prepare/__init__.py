"""`tpad prepare`: turns foreign tables and event logs into `items.parquet` and `sessions.parquet`. It may import `core` and `data`,
and knows nothing of models.
"""
