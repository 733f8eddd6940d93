"""From files of proteins to micro-batches."""
