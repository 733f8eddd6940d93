"""Readers of text: `records` of JSON lines, FASTA and one protein a line, `json_array`, `delimited` of CSV and TSV."""
