"""Gradients summed over ranks that see other tokens; parameters shared out."""
