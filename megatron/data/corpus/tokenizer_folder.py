"""Reads which tokens a tokenizer of transformers has, from the files that it is saved in.

FOLDER/vocab.txt               one token a line
FOLDER/tokenizer.json          {"model": {"vocab": {token: id}}, "added_tokens": [{"id": …, "content": token}]}
FOLDER/added_tokens.json       {token: id}: what was added to vocab.txt
FOLDER/tokenizer_config.json   {"added_tokens_decoder": {id: {"content": token}}, "mask_token": token, …}
FOLDER/special_tokens_map.json {"mask_token": token, …}

Either vocab.txt or tokenizer.json is there; if both are, and for added tokens, all files agree.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.errors import VocabError

LINES, WHOLE = "vocab.txt", "tokenizer.json"
_ADDED, _CONFIG, _NAMES = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"


def lines_of(path: Path) -> list[str]:
    """The lines of a vocabulary file, without white space around them and blank ones at the end.

    Raises OSError, and UnicodeDecodeError if the file is not UTF-8 text.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def has_tokens(folder: Path) -> bool:
    """Whether a file is there that has all tokens but added ones."""
    return any((folder / name).exists() for name in (LINES, WHOLE))


def tokens_in(folder: Path) -> list[str]:
    """The tokens in the order of their ids, added ones included.

    Raises VocabError if files are missing or damaged, if two have different tokens for an id, or if an id has none.
    """
    if not has_tokens(folder):
        raise VocabError(f"{folder}: holds no {LINES} or {WHOLE}; give a folder with the files of a tokenizer")
    found: dict[int, str] = {}
    for file, tokens in _tables(folder):
        for index, token in tokens.items():
            if found.setdefault(index, token) != token:
                raise VocabError(f"{file}: its token {index} is {token}, where another file of this tokenizer has "
                                 f"{found[index]}; copy all of them from one place")
    if lost := sorted({*range(len(found))} - found.keys()):
        raise VocabError(f"{folder}: its tokenizer has no token {lost[0]}, but a token {max(found)}; copy all of its "
                         "files from one place")
    return [found[index] for index in range(len(found))]


def special_tokens_in(folder: Path) -> dict[str, str]:
    """The special tokens that the tokenizer names, by their names there, as "mask_token"; raises VocabError."""
    said = _object(folder / _NAMES) | _object(folder / _CONFIG)
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in said.items()
              if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _tables(folder: Path) -> Iterator[tuple[Path, dict[int, str]]]:
    """Each file that has tokens, and these by id; raises VocabError for a damaged one."""
    readers = {
        LINES: lambda path: dict(enumerate(lines_of(path))),
        WHOLE: lambda path: _by_id(_object(path)["model"]["vocab"]) | {
            token["id"]: token["content"] for token in _object(path).get("added_tokens") or ()},
        _ADDED: lambda path: _by_id(_object(path)),
        _CONFIG: lambda path: {int(index): token["content"] for index, token in
                               (_object(path).get("added_tokens_decoder") or {}).items()}}
    for name, read in readers.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            tokens = read(path)
            is_table = all(type(index) is int and isinstance(token, str) for index, token in tokens.items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            is_table = False
        if not is_table:
            raise VocabError(f"{path}: is damaged, or no tokenizer with a table of tokens; copy it again")
        yield path, tokens


def _by_id(ids: dict[str, int]) -> dict[int, str]:
    return {index: token for token, index in ids.items()}


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if it is not there; raises VocabError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise VocabError(f"{path}: is damaged; copy it again")
    return found
