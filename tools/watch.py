"""Shows a run, in progress or ended, from its folder alone: loss curve, speed, time left, checkpoints.

    python tools/watch.py RUN [--every SECONDS] [--once]

RUN is the folder of a run (its --save), on this machine or on a file system that it shares. The view fills the terminal
until Ctrl-C. With --once, or if the output is not a terminal, it is printed once.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.reading.parser import OneLineParser  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.log import exit_status  # noqa: E402
from megatron.study.watching import frame, look  # noqa: E402

# What a terminal does: another screen without a cursor, and back; the first place; the rest of the line, of the screen.
BEGIN, END, HOME, END_OF_LINE, REST = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H", "\x1b[K", "\x1b[J"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    flags.add_argument("--every", type=float, default=2.0, metavar="SECONDS",
                       help="seconds between two updates (default: 2)")
    flags.add_argument("--once", action="store_true", help="print one view and exit")
    return flags


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, also after Ctrl-C, or 2 for a mistake of the user's."""
    return exit_status(lambda: watch(parser().parse_args(argv)))


def watch(given: argparse.Namespace) -> None:
    """Show what is asked for; raises ConfigError where there is no run."""
    if not 0 < given.every < 1e6:
        raise ConfigError(f"--every is {given.every}; it must be greater than 0")
    if given.once or not sys.stdout.isatty():
        print("\n".join(lines_of(given.run)))
        return
    look(given.run, time.time())  # what is wrong with it is told on the screen that stays
    sys.stdout.write(BEGIN)
    try:
        while True:
            text = "\n".join(f"{line}{END_OF_LINE}" for line in lines_of(given.run))
            sys.stdout.write(f"{HOME}{text}{REST}")
            sys.stdout.flush()
            time.sleep(given.every)
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(END)
        sys.stdout.flush()


def lines_of(folder: Path) -> list[str]:
    """The view of the run in a folder, now, in the size of the terminal, or of one of 80 x 24."""
    size = shutil.get_terminal_size()
    is_plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    return frame(look(folder, time.time()), size.columns, size.lines - 1, is_plain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
