"""Parses `--data-path`: PREFIX or @LIST, several of these as one corpus, or WEIGHT CORPUS pairs.

@LIST names a text file with one prefix of .bin and .idx a line, relative to the list's folder; # begins a comment. Its
prefixes form one corpus, in that order, as if joined by tools/merge_datasets.py. If the list is the only value of
`--data-path`, each prefix may follow a weight; then each is a corpus of its own.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron.errors import ConfigError

_PAIRS = "WEIGHT PREFIX WEIGHT PREFIX …"


@dataclass(frozen=True)
class CorpusFiles:
    """The prefixes of a corpus's datasets, in order, and its `name`: a path, whose folder gets its caches."""

    name: str
    prefixes: tuple[str, ...]


def parse_data_path(data_path: Sequence[str] | None) -> tuple[list[Fraction], list[CorpusFiles]]:
    """The weights of the corpora in `--data-path`, and the corpora; raises ConfigError."""
    if not data_path:
        raise ConfigError("--data-path is missing; give the prefix of PREFIX.bin and PREFIX.idx")
    if len(data_path) == 1 and data_path[0].startswith("@"):
        weights, prefixes = _read_list(data_path[0])
        if any(weights):
            return [_weight(word) for word in weights], [CorpusFiles(prefix, (prefix,)) for prefix in prefixes]
    if _is_number(data_path[0]) and len(data_path) > 1:
        if len(data_path) % 2:
            raise ConfigError(f"--data-path has {len(data_path)} parts; give one prefix, several, or {_PAIRS}")
        return [_weight(word) for word in data_path[::2]], [_corpus([word]) for word in data_path[1::2]]
    return [Fraction(1)], [_corpus(data_path)]


def names_in_short(names: Sequence[str]) -> dict[str, str]:
    """The name that logs and metrics use for each corpus: the last part of its path, or all of it if that is ambiguous.
    """
    shared = Counter(Path(name).name for name in dict.fromkeys(names))
    return {name: name if shared[Path(name).name] > 1 else Path(name).name for name in names}


def _corpus(words: Sequence[str]) -> CorpusFiles:
    """One corpus of the prefixes and lists in `words`; raises ConfigError."""
    prefixes: list[str] = []
    for word in words:
        weights, named = _read_list(word) if word.startswith("@") else ([""], [word.removesuffix(".bin")])
        if any(weights):
            raise ConfigError(f"--data-path: {word[1:]} gives weights, which it may where it is the only one; take "
                              "them out, or give it alone")
        prefixes += named
    twice = [prefix for prefix, count in Counter(map(os.path.abspath, prefixes)).items() if count > 1]
    if twice:
        raise ConfigError(f"--data-path names {twice[0]} twice in one corpus; name it once, or give weights: {_PAIRS}")
    if len(prefixes) == 1:
        return CorpusFiles(prefixes[0], (prefixes[0],))
    more = f"+{len(words) - 1}" if len(words) > 1 else ""
    first = os.path.splitext(words[0][1:])[0] if words[0].startswith("@") else prefixes[0]
    return CorpusFiles(first + more, tuple(prefixes))


def _read_list(word: str) -> tuple[list[str], list[str]]:
    """The weights ("" for none) and prefixes in the list @FILE; raises ConfigError.

    Either all lines have a weight or none has.
    """
    path, weights, prefixes = Path(word[1:]), list[str](), list[str]()
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ConfigError(f"--data-path: {path}: cannot be read ({error.strerror}); @FILE names a list of prefixes, "
                          "one a line") from None
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        first, *rest = text.split(None, 1)
        weight, prefix = (first, rest[0]) if rest and _is_number(first) else ("", text)
        if prefix.startswith("@"):
            raise ConfigError(f"--data-path: line {number} of {path} names a list; a list names prefixes")
        if weights and bool(weights[0]) != bool(weight):
            raise ConfigError(f"--data-path: line {number} of {path} has {'a' if weight else 'no'} weight, unlike "
                              "those before it; give one to all prefixes, or to none")
        weights.append(weight)
        prefixes.append(os.path.join(path.parent, prefix.removesuffix(".bin")))
    if not prefixes:
        raise ConfigError(f"--data-path: {path} names no prefix; it has one of a .bin and .idx a line")
    return weights, prefixes


def _is_number(word: str) -> bool:
    """Whether a word is meant as a weight, even an invalid one."""
    try:
        Fraction(word)
    except ZeroDivisionError:
        return True
    except ValueError:
        return False
    return True


def _weight(word: str) -> Fraction:
    """The weight that a word says; raises ConfigError unless it is positive."""
    try:
        weight = Fraction(word)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ConfigError(f"--data-path: {word} is not a weight above 0; give {_PAIRS}")
    return weight
