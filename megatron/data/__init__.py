"""From files of proteins to micro-batches.

Rooms, in the order of the data's way: `sources/` reads files of any format as blocks of records; `preprocess/` encodes
these into indexed datasets, once, before training; `corpus/` has such datasets, their vocabulary, tokenizer and split;
`rows/` packs proteins into rows and masks them; `batches/` makes micro-batches of rows.
"""
