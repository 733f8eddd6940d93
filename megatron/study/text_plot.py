"""Draws a curve as text: with Braille characters of 2 x 4 dots, or with stars if the terminal has no Braille."""

from collections.abc import Iterator, Sequence

Point = tuple[float, float]
MARK = "o"
_LABEL = 10  # width of the axis labels, in characters
_BRAILLE, _DOTS = 0x2800, ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of the dots, by row
_EARLY, _MANY = 0.05, 20  # with more than _MANY points, the first _EARLY of the x range may be above the picture


def text_plot(line: Sequence[Point], marks: Sequence[Point], width: int, height: int, is_plain: bool = False,
              ) -> list[str]:
    """The plot as `height` lines of `width` characters: `line` as a curve, and a MARK at each point of `marks`.

    Points are finite (x, y), by increasing x; those in the same column are averaged. [] if there is no point or too
    little room. `is_plain`: without Braille.
    """
    points, num_columns, num_rows = [*line, *marks], width - _LABEL - 2, height - 1
    if not points or num_columns < 10 or num_rows < 2:
        return []
    (left, right), (low, high) = _ranges(points)
    across, down = (1, 1) if is_plain else (2, 4)  # dots of a letter

    def place(x: float, y: float, columns: int, rows: int) -> tuple[int, int]:
        return round((x - left) / (right - left) * (columns - 1)), round((high - y) / (high - low) * (rows - 1))

    dots = set(_joined([place(x, y, across * num_columns, down * num_rows) for x, y in line]))
    letters = {place(x, y, num_columns, num_rows): MARK for x, y in marks}
    rows = ["".join(letters.get((column, row)) or _letter(dots, column, row, is_plain) for column in range(num_columns))
            for row in range(num_rows)]
    labels = {0: f"{high:.4g}", num_rows // 2: f"{high - (high - low) * (num_rows // 2) / (num_rows - 1):.4g}",
              num_rows - 1: f"{low:.4g}"}
    ends = f"{left:,.0f}", f"{right:,.0f}"
    below = ends[0] + ends[1].rjust(num_columns - len(ends[0]))
    return [*(f"{labels.get(number, ''):>{_LABEL}} |{row}".rstrip() for number, row in enumerate(rows)),
            f"{'':{_LABEL}}  {below}"]


def _ranges(points: Sequence[Point]) -> tuple[Point, Point]:
    """The ranges of x and of y to show, neither empty."""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    early = _EARLY if len(points) > _MANY else 0.0
    late = [y for x, y in points if x >= left + early * (right - left)]
    low, high = min(late), max(late)
    return (left, right if right > left else left + 1), (low, high if high > low else low + abs(low) / 100 + 1e-6)


def _joined(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The dots of a polyline through the mean row of each column."""
    heights: dict[int, list[int]] = {}
    for column, row in places:
        heights.setdefault(column, []).append(row)
    means = sorted((column, sum(rows) / len(rows)) for column, rows in heights.items())
    for (first, start), (last, end) in zip(means, means[1:] or means, strict=False):
        steps = max(1, last - first, round(abs(end - start)))
        for step in range(steps + 1):
            share = step / steps
            yield round(first + share * (last - first)), round(start + share * (end - start))


def _letter(dots: set[tuple[int, int]], column: int, row: int, is_plain: bool) -> str:
    """The character for a cell of the plot."""
    if is_plain:
        return "*" if (column, row) in dots else " "
    bits = sum(bit for y, bits_of_row in enumerate(_DOTS) for x, bit in enumerate(bits_of_row)
               if (2 * column + x, 4 * row + y) in dots)
    return chr(_BRAILLE + bits) if bits else " "
