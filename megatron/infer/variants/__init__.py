"""Variants of proteins scored: what is read, what a model says of each, what comes of it in files and pictures."""
