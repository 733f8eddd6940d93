"""Trained models taught a task: labelled proteins, heads, training, low-rank adapters, and how well it is done."""
