"""How well a model predicts masked residues: by letter, by position in the protein, and with what standard error.

`run` evaluates a model, `tally` counts, `record` collects the results of several models, `picture` draws them.
"""
