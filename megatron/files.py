"""Files and folders that appear under their final name only when they are whole and on the disk."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK, _REPLACED = ".unfinished-", "-replaced"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Whoever reads `path` sees the old content or the new, never a part; several may replace it at once.
    """
    temporary = path.with_name(f"{_MARK}{path.name}-{uuid.uuid4().hex}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def left_over(path: Path, begins: bool = False) -> Iterator[Path]:
    """What killed processes have left of their attempts to replace `path`, a file or a folder.

    `begins`: or whatever has a name that begins so.
    """
    ours = re.compile(re.escape(_MARK + path.name) + (".*" if begins else f"({_REPLACED}|-[0-9a-f]{{32}})?"))
    return (other for other in path.parent.glob(f"{_MARK}*") if ours.fullmatch(other.name))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def begin_folder(path: Path) -> Path:
    """An empty temporary folder beside `path`, for `finish_folder`; what killed processes left of theirs goes.

    One process at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in left_over(path):
        shutil.rmtree(old, ignore_errors=True)
    temporary = path.parent / f"{_MARK}{path.name}"
    temporary.mkdir()
    return temporary


def finish_folder(path: Path) -> None:
    """Give what `begin_folder` made for `path` its name, once all its files are on the disk; replaces what is there."""
    temporary = path.parent / f"{_MARK}{path.name}"
    sync(temporary)
    if path.exists():
        replaced = path.parent / f"{_MARK}{path.name}{_REPLACED}"
        path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced)
    else:
        temporary.rename(path)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = begin_folder(path)
    try:
        yield temporary
        finish_folder(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
