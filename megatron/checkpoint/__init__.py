"""Checkpoints: saved atomically, loaded without executing any code."""
