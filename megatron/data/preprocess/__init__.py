"""From files of proteins to an indexed dataset: `tools/preprocess_data.py`."""
