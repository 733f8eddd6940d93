"""Which residues touch: told by a model, its weights fitted on structures, compared with the truth, drawn."""
