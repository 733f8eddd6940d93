"""Contact prediction: which residues of a protein touch, fitted on structures, evaluated against them, and drawn.

`structures` reads files as `chains`, which know their contacts. Scores come from `regression` on attention maps, fitted
by `l1_logistic`, or from the categorical `jacobian`. `precision` evaluates them, `output` writes, `picture` draws.
"""
