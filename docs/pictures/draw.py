"""Draws the diagrams of the documentation: `python docs/pictures/draw.py` writes rows.svg, axes.svg and floors.svg.

Each function gives the text of one SVG, which GitHub shows in light and dark: it has a background of its own.
"""

from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
INK, PALE = "#222", "#eceff3"


def box(x: float, y: float, width: float, height: float, fill: str, text: str = "", ink: str = "#fff",
        size: int = 13) -> str:
    """A rectangle with a text in its middle."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}"/>'
    return shape + (label(x + width / 2, y + height / 2 + size / 3, text, ink, size, "middle") if text else "")


def label(x: float, y: float, text: str, ink: str = INK, size: int = 13, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" fill="{ink}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def picture(width: int, height: int, title: str, *shapes: str) -> str:
    """An SVG of these shapes, which says what it shows."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, sans-serif">')
    return "\n".join([head, f"<title>{escape(title)}</title>", f'<rect width="{width}" height="{height}" fill="#fff"/>',
                      *shapes, "</svg>"]) + "\n"


def rows() -> str:
    """A padded batch, the same proteins in packed rows, and who attends to whom in the first row."""
    lengths = (300, 190, 110, 250, 200, 140)
    shapes = [label(20, 30, "Padded: grey is work for nothing", size=15)]
    for number, length in enumerate(lengths):
        y = 42 + 22 * number
        shapes += [box(20, y, 300, 18, PALE), box(20, y, length, 18, COLOURS[number], f"protein {number + 1}", size=11)]
    shapes += [label(20, 208, "The same in packed rows, each protein behind its own [CLS]", size=15)]
    for y, places in ((220, (0, 1, 2)), (248, (3, 4, 5))):
        x = 20.0
        shapes.append(box(20, y, 604, 22, PALE))
        for place in places:
            shapes += [box(x, y, 10, 22, INK), box(x + 10, y, lengths[place] - 10, 22, COLOURS[place],
                                                   f"protein {place + 1}: 1, 2, 3, …", size=11)]
            x += lengths[place]
    shapes += [label(20, 290, "black: [CLS], place 0 of its protein · grey: filler, drawn wider than it is (0.2 %)",
                     size=12)]
    shapes += [label(360, 30, "Attention in the first row", size=15)]
    corner, side, start = (360, 42), 132, 0.0
    shapes.append(box(*corner, side, side, PALE))
    for number in range(3):
        part = lengths[number] * side / 604
        shapes.append(box(corner[0] + start, corner[1] + start, part, part, COLOURS[number]))
        start += part
    shapes += [label(504, 70 + 22 * line, text, size=12) for line, text in enumerate(
        ("each protein attends", "to itself alone;", "nothing is computed", "where it is grey"))]
    return picture(650, 304, "Proteins in padded and in packed rows, and attention inside each protein", *shapes)


def axes() -> str:
    """Sixteen ranks as pipeline 2 x data 2 x context 2 x tensor 2, and what each axis splits."""
    title = "16 ranks: pipeline 2 × data 2 × context 2 × tensor 2 (tensor ranks are neighbours)"
    shapes = [label(20, 28, title, size=15)]
    for pipeline in range(2):
        for data in range(2):
            x, y = 20 + 315 * data, 44 + 148 * pipeline
            shapes += [box(x, y, 300, 134, PALE),
                       label(x + 10, y + 20, f"stage {pipeline} of the depth · rows {'AB'[data]}")]
            for context in range(2):
                for tensor in range(2):
                    rank = ((pipeline * 2 + data) * 2 + context) * 2 + tensor
                    shapes.append(box(x + 10 + 142 * tensor, y + 32 + 48 * context, 136, 42,
                                      COLOURS[2 * context + tensor],
                                      f"rank {rank}: half {tensor + 1}, tokens {context + 1}", size=11))
    told = (("data", "other rows of the batch; gradients are summed once a step"),
            ("pipeline", "other blocks; hidden states pass from stage to stage"),
            ("context", "other tokens of the same rows; keys and values pass around"),
            ("tensor", "other heads, features and ids of the same layers; activations are summed in each block"))
    for line, (name, text) in enumerate(told):
        shapes += [label(20, 362 + 22 * line, name, COLOURS[0]), label(100, 362 + 22 * line, text)]
    return picture(650, 446, "The four axes of the grid of ranks", *shapes)


def floors() -> str:
    """The floors of the code: imports go down only."""
    storeys = (("pretrain_tape.py · tools/ · protein_tools/ · examples/", "the doors: what a person runs"),
               ("doctor/", "this machine examined"), ("finetune/ · plan/ · study/", "tasks, layouts, runs compared"),
               ("train/ · infer/", "the run; a model asked"), ("checkpoint/", "saved, loaded, converted"),
               ("optim/", "optimizers, schedules, averages"), ("data/   |   model/", "neither imports the other"),
               ("parallel/", "ranks and what passes between them"), ("kernels/", "operations: reference, fast paths"),
               ("config/ · errors · files · log", "the ground"))
    shapes = [label(20, 28, "Floors of megatron/: a module imports from its own floor and from those below", size=15)]
    for number, (names, told) in enumerate(storeys):
        y, indent = 42 + 34 * number, 4 * (len(storeys) - 1 - number)
        shapes += [box(20 + indent, y, 380 - 2 * indent, 28, COLOURS[0] if number % 2 else "#35597e", names, size=12),
                   label(424, y + 19, told, size=12)]
    return picture(650, 392, "The floors of the code", *shapes)


def pictures() -> dict[str, str]:
    """The text of each file by its name."""
    return {"rows.svg": rows(), "axes.svg": axes(), "floors.svg": floors()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
