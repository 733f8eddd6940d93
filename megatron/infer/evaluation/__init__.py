"""How well a model predicts masked residues: by letter, by position in the protein, and with what standard error."""
