"""Proteins packed into rows: packing, its cache, masks, clusters, blends."""
