"""Trained models that are asked, not trained: a checkpoint as a model, and proteins as what it takes."""
