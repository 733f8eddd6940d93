"""Proteins packed into rows: packing, its cache, masks, clusters, blends.

`dataset` builds the datasets of a run from its flags: `data_path` reads --data-path, `blend` mixes corpora by weights,
`packed` is one corpus as an endless sequence of rows. For that `packing` decides which protein lies in which row, and
`row_cache` keeps the decision on disk (`cache_files`); `clusters` picks an epoch's proteins; `masking` masks a row, and
`fixed_masks` does so in evaluations, alike in every run.

`members` lists the proteins in given rows; `baselines` are the losses that a model must beat.
"""
