"""Embeds a file of proteins into one output file, in parts, so that a killed run can continue.

`run` does it: `survey` first finds the lengths and the equal proteins, `parts` keeps the results on disk, `writers`
writes the output in the format asked for.
"""
