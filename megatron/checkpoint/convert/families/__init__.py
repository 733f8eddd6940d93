"""Weights that everyone has, in and out: ESM-2, ESM-1b and ESM-1v, ProtBERT; and ours for those who use them.

`hf`: folders of transformers. `esm`: files of fair-esm. Both are tables of names.
"""
