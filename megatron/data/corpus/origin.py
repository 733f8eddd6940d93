"""Which vocabulary gave an indexed dataset its ids: what its statistics say, or what the ids themselves tell."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.indexed import IndexedDataset
from megatron.data.corpus.vocab import Vocab
from megatron.errors import DataError

_SAMPLES, _SAMPLE_TOKENS = 64, 2048


def check_vocabulary(indexed: IndexedDataset, vocab: Vocab, vocab_file: str | Path) -> None:
    """Raises DataError where the ids of a dataset are not those of `vocab`, which was read from `vocab_file`.

    Preprocessing leaves PREFIX.stats.json beside PREFIX_KEY_LEVEL.bin. Where it does not name the vocabulary, a sample
    of the ids must be such as proteins give: none past the vocabulary, and no [PAD], [MASK] or [CLS].
    """
    remedy = f"give the vocabulary that it was preprocessed with, or preprocess it again with --vocab-file {vocab_file}"
    mistake = f"{indexed.prefix}: its vocabulary is not {vocab_file}"
    tokens = _tokens_of_statistics(indexed.prefix)
    if tokens is not None:
        different = [index for index, (now, then) in enumerate(zip(vocab.tokens, tokens, strict=False)) if now != then]
        if different or len(tokens) != vocab.size:
            at = different[0] if different else min(len(tokens), vocab.size)
            then, now = (names[at] if at < len(names) else "nothing" for names in (tokens, vocab.tokens))
            raise DataError(f"{mistake}: its id {at} means {then}, and {now} there; {remedy}")
        return
    special = [vocab.pad_id, vocab.mask_id, vocab.cls_id]
    sample = _sample(indexed.tokens)
    wrong = sample[(sample >= vocab.size) | (sample < 0) | np.isin(sample, special)]
    if len(wrong):
        meaning = vocab.tokens[wrong[0]] if 0 <= wrong[0] < vocab.size else f"past the {vocab.size} tokens"
        raise DataError(f"{mistake}: it holds id {wrong[0]}, which is {meaning} there and in no protein; {remedy}")


def _tokens_of_statistics(prefix: str) -> list[str] | None:
    """The tokens that the preprocessing of PREFIX_KEY_LEVEL had, in order; None where nothing says."""
    name = Path(f"{prefix}.bin").name
    stem = prefix.rpartition("_")[0]
    while "_" in Path(stem).name:
        stem = stem.rpartition("_")[0]  # a key may have underscores too
        stats = _read(Path(f"{stem}.stats.json"))
        try:
            files = [Path(file["path"]).name for output in stats["outputs"].values() for file in output["files"]]
            tokens = stats["vocabulary"]["tokens"]
        except (KeyError, TypeError, AttributeError):
            continue
        if name in files and isinstance(tokens, list):
            return tokens
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _sample(tokens: np.ndarray) -> np.ndarray:
    """Evenly spread stretches of the ids, int64; all of them where they are few."""
    if len(tokens) <= _SAMPLES * _SAMPLE_TOKENS:
        return tokens.astype(np.int64)
    starts = np.linspace(0, len(tokens) - _SAMPLE_TOKENS, _SAMPLES).astype(np.int64)
    return np.concatenate([tokens[start:start + _SAMPLE_TOKENS] for start in starts]).astype(np.int64)
