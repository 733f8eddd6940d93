"""Reads files of proteins of every supported kind, as blocks of whole records.

Begin with `source`: an input, a file or a folder (`folders` finds its files), as blocks and the texts in them.
`streams` reads, decompresses and cuts a file, `tar` reads the files in an archive, `kinds` detects a file's format by
its content and chooses the reader, for text by what it `looks` like; `block` has the types that all readers share.
`json_lines` converts files to JSON lines.

Rooms: `text/` and `binary/`, the readers.
"""
