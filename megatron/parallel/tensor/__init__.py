"""Layers, stream and vocabulary, whole or split over the tensor axis."""
