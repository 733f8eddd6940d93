"""Where the programs are that the tests' environment brings along, such as linters of files that are not Python."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def find_program(name: str) -> str:
    """The path of a program in this Python's environment, active or not, or on PATH; skips the test without it."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return path or pytest.skip(f"{name} is not installed")
