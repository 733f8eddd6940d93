"""Scores variants of proteins: reads files of variants, computes scores, writes files and heat maps.

`run` goes through the files, `record` knows which are done. `assays` are files of variants, read by `tables`, written
in the notation of `mutants`; `wild_types` finds the protein that each varies. `scores` computes the scores. `averages`
averages correlations over many assays; `substitutions` is the table of all those of one protein,
`substitutions_picture` its heat map.
"""
