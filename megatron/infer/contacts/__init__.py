"""Contact prediction: which residues of a protein touch, fitted on structures, evaluated against them, and drawn."""
