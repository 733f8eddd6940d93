"""Vocabulary, tokenizer, indexed datasets, and the split into training, validation and test documents.

`vocab` is a vocabulary, of a file or of a `tokenizer_folder` of transformers; `tokenizer` turns residues into its ids.

`indexed_writer` writes Megatron's indexed datasets, `indexed` reads them, mapped into memory by `mapping`; `origin`
says which vocabulary one was made with, and keeps its statistics. `joined` makes one corpus of several, `split` divides
it into training, validation and test, `documents` gives packing its proteins.
"""
