"""Reads files of proteins of every supported kind, as blocks of whole records."""
