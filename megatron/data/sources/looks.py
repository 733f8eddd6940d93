"""Tells from the first lines of a text file whether it is a table with delimiters, one protein a line, or prose.

Only whole lines are judged. A protein may be in either case, with gaps and a stop, and with spaces between residues or
between groups of equal length. Prose has words of any length, capitals before small letters, and the letters B, J, O, U
and Z far more often than proteins.
"""

import re

HEAD_BYTES = 1 << 16
_NO_RESIDUES = re.compile(rb"[^A-Za-z*\-.\s]")
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_CAPITALISED = re.compile(rb"(?<!\S)[A-Z][a-z]{2,}\.?(?!\S)")
_RARE_RESIDUES = re.compile(rb"[BJOUZbjouz]")
_MAX_RARE_SHARE = 0.05  # under 0.01 in proteins, 0.10 to 0.12 in English or German
_MANY_LETTERS = 200
_DELIMITERS = (b"\t", b",", b";")
_SEQUENCE = r"((aa|amino_?acid|protein)[_ ]?)?(seq|sequence)|primary"
_NAME_OF_SEQUENCES = re.compile(_SEQUENCE, re.IGNORECASE)
_ONLY_HEADER = re.compile(rf'"?({_SEQUENCE}|sequences|seqs|text|proteins?|peptides?)"?'.encode(), re.IGNORECASE)
_QUOTED = re.compile(rb'"[^",;\t]+"')


def delimiter_of(head: bytes) -> bytes | None:
    """The delimiter if the text is CSV or TSV, else None; a comma for a table of a single column with a header."""
    first, *others = [line for line in head.split(b"\n") if line.strip()][:3]
    is_lone = b"\t" not in b"".join([first, *others[:1]])
    if is_lone and (_ONLY_HEADER.fullmatch(first.strip()) or _QUOTED.fullmatch(first.strip())):
        return b","
    if _CONTROLS.search(first.replace(b"\t", b"")):
        return None
    is_cut = len(others) == 1 and len(head) >= HEAD_BYTES
    for delimiter in _DELIMITERS if others else ():
        columns, fields = _num_fields(first, delimiter), _num_fields(others[0], delimiter)
        if columns > 1 and (fields == columns or (is_cut and fields < columns)):
            is_spaced_residues = delimiter == b"\t" and max(map(len, first.split())) == 1
            return None if is_spaced_residues else delimiter
    return None


def is_one_a_line(head: bytes) -> bool:
    """Whether most of the lines look like proteins."""
    lines = [line for line in _whole_lines(head) if line.strip()]
    clean = [line for line in lines if not _NO_RESIDUES.search(line)]
    if 2 * len(clean) < len(lines) or 2 * sum(map(_is_words, clean)) > len(clean):
        return False
    letters = b"".join(clean)
    return len(letters) < _MANY_LETTERS or _rare_share(letters) < _MAX_RARE_SHARE


def is_name_of_sequences(column: str) -> bool:
    """Whether a column's name says unmistakably that it holds sequences."""
    return _NAME_OF_SEQUENCES.fullmatch(column) is not None


def _is_words(line: bytes) -> bool:
    """Whether a line of letters looks like prose, not like a protein."""
    if _CAPITALISED.search(line):
        return True
    sizes = [len(group) for group in line.split()]
    if len(sizes) == 1 or max(sizes) == 1:
        return False
    is_in_blocks = len(set(sizes[:-1])) == 1 and sizes[-1] <= sizes[0]
    is_of_both_cases = line not in (line.upper(), line.lower())
    return (is_of_both_cases and not is_in_blocks) or _rare_share(line) >= _MAX_RARE_SHARE


def _rare_share(text: bytes) -> float:
    """The share of letters that are rare in proteins."""
    return len(_RARE_RESIDUES.findall(text)) / max(len(text), 1)


def _num_fields(line: bytes, delimiter: bytes) -> int:
    """The number of fields in a line; delimiters within quotes do not count."""
    return 1 + re.sub(rb'"[^"]*"', b"", line).count(delimiter)


def _whole_lines(head: bytes) -> list[bytes]:
    """The lines of `head` without the last one if it may be truncated, unless it is the only one."""
    lines = head.split(b"\n")
    return lines if len(head) < HEAD_BYTES else lines[:-1] or lines
