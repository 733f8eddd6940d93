"""Readers of text files, and tests that tell them apart.

`records` reads JSON lines, FASTA and one protein a line, `json_array` a JSON array, `delimited` CSV and TSV. `looks`
tells by the first lines whether text is a table, one protein a line, or prose.
"""
