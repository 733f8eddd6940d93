"""Conversion of checkpoints: a module for each format, with `recognises()`, `read()` and `write()`.

`formats` lists them; `conversion` converts one into another, `inspection` reports on a checkpoint of any. Our own are
`sharded` and `whole`; the others are in rooms: `megatron_v2/`, `megatron_core/` (current Megatron-LM), `families/`
(folders of transformers, files of fair-esm).

What several formats need: `vocabulary` pads and cuts the vocabulary's rows, `token_types` treats what only BERT has.
For files of torch.save, `torch_files` reads them by `torch_pickle`, which
runs nothing of the pickle, as tensors of `torch_storage`; `torch_writing` writes them.
"""
