"""Labelled proteins: tasks and their files, labels of every kind, examples in memory, micro-batches of packed rows."""
