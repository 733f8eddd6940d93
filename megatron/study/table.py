"""Formats tables and numbers for a terminal."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """The rows under `heads`, in aligned columns; the first `num_left` columns are left-aligned, the others right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if index < num_left else cell.rjust(width)
                               for index, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def in_short(number: float) -> str:
    """A number with three digits and a letter for thousands, millions and so on, such as 1.23M."""
    for exponent, letter in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 0.9995 * 10**exponent:
            return f"{number / 10**exponent:#.3g}".rstrip(".") + letter
    return f"{number:.3g}"
