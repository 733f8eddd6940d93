"""Scores variants of proteins: reads files of variants, computes scores, writes files and heat maps."""
