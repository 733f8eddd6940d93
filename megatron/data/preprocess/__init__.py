"""Makes an indexed dataset of files of proteins, for `tools/preprocess_data.py`, and merges such datasets.

`run` does the whole, as the `flags` say: `workers` encode blocks in order, each by `encode`; `duplicates` finds
proteins seen before, `nucleotides` DNA and RNA, `tally` counts, `progress` shows how far it is. `merging` joins
datasets, for `tools/merge_datasets.py`.
"""
