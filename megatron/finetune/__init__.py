"""Trained models taught a task: proteins with labels, what is learnt beside the model, and how well it is done."""
