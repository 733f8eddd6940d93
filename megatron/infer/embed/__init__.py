"""Embeds a file of proteins into one output file, in parts, so that a killed run can continue."""
