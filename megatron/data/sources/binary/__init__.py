"""Readers of binary files: Parquet, Arrow, and TAPE's LMDB."""
