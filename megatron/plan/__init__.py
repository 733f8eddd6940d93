"""Predicts the cost of a layout without running it: a rank's memory, messages and time, measured on fake tensors."""
