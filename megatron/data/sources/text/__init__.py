"""Readers of text files: JSON, FASTA, one protein a line, CSV and TSV; and tests that tell them apart."""
