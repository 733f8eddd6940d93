"""Trained models taught a task: flags, heads, the model with one, its training, the runs of all seeds."""
