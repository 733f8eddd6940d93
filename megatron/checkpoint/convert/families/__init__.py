"""Reads and writes published protein models, ESM-2, ESM-1b, ESM-1v and ProtBERT, and writes ours for their programs.

`hf`: folders of transformers. `esm`: files of fair-esm. The tables of parameter names are in `names`.
"""
