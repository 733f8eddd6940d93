"""Makes an indexed dataset of files of proteins, for `tools/preprocess_data.py`, and merges such datasets."""
