"""The nearest matrix with orthogonal rows, approximately: Newton-Schulz iteration, and its symmetric products."""
