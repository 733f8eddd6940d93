"""Labelled proteins: from files to micro-batches of packed rows.

`tasks` defines tasks by the kind of their labels, keys and files; `record` is a protein as a file has it, `kinds`
infers the kind of its label and `labels` reads it (`contacts` those that are pairs of residues), `examples` holds all
in memory, `batches` packs them.
"""
