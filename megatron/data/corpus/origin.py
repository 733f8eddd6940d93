"""Finds the vocabulary that an indexed dataset was preprocessed with, and maintains its statistics (.stats.json).

Preprocessing writes PREFIX.stats.json beside PREFIX_KEY_LEVEL.bin: one file for the outputs of all keys.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.indexed import IndexedDataset
from megatron.data.corpus.vocab import DEFAULT_VOCAB, RESIDUE_LETTERS, Vocab, lacking
from megatron.errors import DataError
from megatron.files import left_over, locked, write_json

_SAMPLES, _SAMPLE_TOKENS = 64, 2048


def corpus_vocabulary(indexed: IndexedDataset) -> Vocab:
    """The vocabulary that a dataset was preprocessed with; raises DataError if it is unknown.

    It is read from the dataset's statistics. Without them it is assumed to be iupac, ProteinLM's, provided that a
    sample of the ids holds only letters, [UNK] and [SEP] of it.
    """
    tokens = _tokens_of_statistics(indexed.prefix)
    if tokens is not None:
        missing = lacking(tokens, ("unk",))
        if missing:
            raise DataError(f"{indexed.prefix}: its statistics name a vocabulary that is none of proteins, as it lacks "
                            f"{' '.join(missing)}; preprocess it again")
        return Vocab(tuple(tokens))
    vocab = Vocab.from_file()
    known = [*vocab.residue_ids, vocab.unk_id, vocab.sep_id]
    sample = _sample(indexed.tokens)
    wrong = sample[~np.isin(sample, known)]
    if len(wrong):
        meaning = vocab.tokens[wrong[0]] if 0 <= wrong[0] < vocab.size else f"past the {vocab.size} tokens"
        raise DataError(f"{indexed.prefix}: no statistics name its vocabulary, and it is not {DEFAULT_VOCAB.name}: it "
                        f"holds id {wrong[0]}, which is {meaning} there and in no protein; put the .stats.json of its "
                        "preprocessing beside it, or preprocess it again")
    return vocab


def id_table(corpus: Vocab, vocab: Vocab) -> np.ndarray | None:
    """The id in `vocab` of each id in `corpus`, int64 [size of `corpus`]; None if the vocabularies are the same.

    Letters map to the same letter. A letter without a token in `vocab` becomes its unknown token, not X. The token
    that ends a protein maps to that of `vocab`; all others, which occur in no protein, map to the unknown token.
    """
    if corpus.tokens == vocab.tokens:
        return None
    table = np.full(corpus.size, vocab.unk_id, dtype=np.int64)
    for letter in RESIDUE_LETTERS:
        if letter in corpus.ids:
            table[corpus.ids[letter]] = vocab.ids.get(letter, vocab.unk_id)
    if not lacking(corpus.tokens, ("sep",)):
        table[corpus.sep_id] = vocab.sep_id
    return table


def statistics_of(prefix: str) -> tuple[Path, dict[str, Any]] | None:
    """The statistics file that lists PREFIX.bin as an output, and its content; None if there is none.

    A merge writes it to PREFIX.stats.json, preprocessing mostly to the prefix without _KEY_LEVEL.
    """
    stem = prefix
    while True:
        path = Path(f"{stem}.stats.json")
        stats = _read(path)
        with suppress(KeyError, TypeError, AttributeError):
            if f"{Path(prefix).name}.bin" in (Path(file["path"]).name for output in stats["outputs"].values()
                                              for file in output["files"]):
                return path, stats
        if "_" not in Path(stem).name:
            return None
        stem = stem.rpartition("_")[0]  # a key may have underscores too


def forget(prefix: str) -> None:
    """Remove PREFIX.bin from all statistics, before it is replaced; other outputs listed with it get their own file."""
    own = Path(f"{prefix}.stats.json")
    with locked(own.parent):
        while found := statistics_of(prefix):
            path, stats = found
            _keep({other: one for other, one in _apart(path, stats).items() if other != own})
            path.unlink(missing_ok=True)  # without file locks, another job may have been first


def put_statistics(path: Path, stats: dict[str, Any]) -> None:
    """Write statistics to `path`, PREFIX.stats.json.

    Other existing outputs that the old file there lists get a file of their own. If the old file belongs to a merge,
    which has an output PREFIX.bin, it stays, and the outputs of `stats` get files of their own instead.
    """
    with locked(path.parent):  # jobs for other keys may write it too
        new = _apart(path, stats)
        old = {own: one for own, one in _apart(path, _read(path)).items() if own not in new}
        _keep(old)
        for place, one in (new if path in old else {path: stats}).items():
            for unfinished in left_over(place):
                unfinished.unlink(missing_ok=True)
            write_json(place, one)


def _apart(path: Path, stats: Any) -> dict[Path, dict[str, Any]]:
    """The statistics of each existing output alone, by the path of a file of its own, PREFIX_KEY_LEVEL.stats.json."""
    apart: dict[Path, dict[str, Any]] = {}
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        for key, output in stats["outputs"].items():
            (name,) = (file.name for file in (Path(file["path"]) for file in output["files"]) if file.suffix == ".bin")
            if path.with_name(name).exists():
                own = path.with_name(f"{name.removesuffix('.bin')}.stats.json")
                apart[own] = {**stats, "outputs": {key: output}}
    return apart


def _keep(apart: dict[Path, dict[str, Any]]) -> None:
    """Write those statistics whose file does not exist yet."""
    for own, one in apart.items():
        if not own.exists():
            write_json(own, one)


def _tokens_of_statistics(prefix: str) -> list[str] | None:
    """The tokens of a dataset's vocabulary, in order, from its statistics; None if they do not say."""
    found = statistics_of(prefix)
    try:
        tokens = found[1]["vocabulary"]["tokens"] if found else None
    except (KeyError, TypeError):
        return None
    return tokens if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) else None


def _read(path: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _sample(tokens: np.ndarray) -> np.ndarray:
    """Evenly spaced stretches of the ids, int64; all of them if they are few."""
    if len(tokens) <= _SAMPLES * _SAMPLE_TOKENS:
        return tokens.astype(np.int64)
    starts = np.linspace(0, len(tokens) - _SAMPLE_TOKENS, _SAMPLES).astype(np.int64)
    return np.concatenate([tokens[start:start + _SAMPLE_TOKENS] for start in starts]).astype(np.int64)
