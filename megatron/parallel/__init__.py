"""Ranks and what passes between them: the mesh, collectives, layers, data parallelism, randomness."""
