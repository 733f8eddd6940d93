"""The kinds that are no text: Parquet and Arrow with their columns, and LMDB with its pickles."""
