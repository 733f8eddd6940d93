"""Readers of binary files: `parquet` and `arrow`, by the `columns` of their tables, and `tape_lmdb`, TAPE's LMDB."""
