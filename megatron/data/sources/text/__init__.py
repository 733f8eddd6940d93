"""The kinds of text: JSON, FASTA and one protein a line; CSV and TSV; and what a text looks like."""
