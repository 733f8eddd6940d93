"""The text of `--help`, which has the commonest flags, and the usage and examples that `--help-all` shares."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields

from megatron.config.declaration import flag_name, is_switch, shown
from megatron.config.reading.parser import columns, value_name

USAGE = "pretrain_tape.py [--preset NAME] [--config FILE] [--FLAG VALUE ...]"
DESCRIPTION = "Pretrain a protein language model on packed proteins."
EXAMPLES = """
examples:
  python pretrain_tape.py --preset demo --data-path PREFIX --save run --load run
      a small model, on the PREFIX.bin and .idx of tools/preprocess_data.py;
      if it is stopped, the same command resumes it
  python pretrain_tape.py --preset esm2-8m --lr 3e-4 --write-config run.toml
      a file of all flags and their values, for you to edit
  python pretrain_tape.py --config run.toml --data-path PREFIX --save run
      the flags of the file; those on the command line override them
"""
_HELP_AT = 34


def short_help(sections: Sequence[type]) -> str:
    """The help with only the commonest flags of the sections, each in a line or two, as wide as the terminal."""
    num_flags = sum(not item.metadata["is_hidden"] for section in sections for item in fields(section))
    lines = [f"usage: {USAGE}", "", *textwrap.wrap(f"{DESCRIPTION} These are the commonest flags; --help-all has all "
                                                   f"{num_flags}, and says more of each.", columns())]
    for section in sections:
        lines += ["", *textwrap.wrap(f"{section.__name__.removesuffix('Config').lower()}: {section.__doc__}",
                                     columns(), subsequent_indent="  ")]
        for item in fields(section):
            lines += _rows(item) if item.metadata["common"] else ()
    return "\n".join(lines) + "\n" + EXAMPLES


def in_short(item: Field) -> str:
    """The first words of the flag's help, with its choices."""
    choices = [str(choice) for choice in item.metadata["choices"] or ()]
    return first_words(item) + (f": {', '.join(choices)}" if len(choices) > 1 else "")


def first_words(item: Field) -> str:
    """The first words of the flag's help, up to a semicolon, a bracket or, with choices, a colon."""
    text = item.metadata["help"].split("; ")[0].split(" (")[0]
    first = text.split(": ")[0]
    choices = item.metadata["choices"]
    return text if not choices or first in choices else first


def _rows(item: Field) -> Iterator[str]:
    """The lines of the short help on one flag."""
    names = flag_name(item) if is_switch(item) else f"{flag_name(item)} {value_name(item)}"
    default = "" if item.default is None or is_switch(item) else f" ({shown(item.default)})"
    first, *others = textwrap.wrap(in_short(item) + default, columns() - _HELP_AT, break_on_hyphens=False)
    if len(names) > _HELP_AT - 4:
        yield f"  {names}"
        names = ""
    yield f"  {names:<{_HELP_AT - 2}}{first}"
    yield from (" " * _HELP_AT + line for line in others)
