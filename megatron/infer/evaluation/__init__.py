"""How well a model predicts masked residues: of which letters, where in a protein, and how sure that is."""
