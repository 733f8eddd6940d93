"""Reads and writes published protein models, ESM-2, ESM-1b, ESM-1v and ProtBERT, and writes ours for their programs.

`hf` reads folders of transformers, and writes them by `hf_writing` with a model `card` and the files of a `tokenizer`;
`esm` reads and writes files of fair-esm. Both read by `reading`, with the parameters' names in `names`. `flags`
translates config.json to our flags and back; `vocabularies` finds out which vocabulary a model was trained with.

Room: `remote/` (code for transformers, for models that none of its own classes can compute).
"""
