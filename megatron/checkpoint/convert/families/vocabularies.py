"""Finds out which vocabulary a model was trained with: that of its family, or that of a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.vocabulary import WORDS, rows_for
from megatron.config.data import VOCABULARIES
from megatron.data.corpus.tokenizer_folder import (
    LINES,
    WHOLE,
    has_tokens,
    lines_of,
    special_tokens_in,
    tokens_in,
)
from megatron.data.corpus.vocab import SPECIAL_TOKENS, Vocab
from megatron.errors import CheckpointError, VocabError

_ROLES = {"cls": ("cls_token",), "sep": ("sep_token", "eos_token"), "pad": ("pad_token",), "unk": ("unk_token",)}


def vocabulary_in(folder: Path, usual: str, num_rows: int, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's state on the vocabulary of a folder of transformers.

    They are "config" (our flags for it), "vocabulary" (its identity) and "notes"; if the vocabulary is unknown,
    "lacks_vocabulary" replaces "vocabulary". `usual`: the vocabulary to assume where no file of a tokenizer is there,
    if its number of tokens is `num_rows`; `ids`: those in config.json of tokens that the model treats specially, by
    role ("mask", "pad"), None if not given. Raises CheckpointError if the tokens are not a protein vocabulary, are more
    than `num_rows`, or have other ids.
    """
    if not has_tokens(folder):
        return _assumed(usual, num_rows, ids, folder)
    try:
        tokens, special = tokens_in(folder), special_tokens_in(folder)
        vocab = Vocab.from_file(folder, _mask_token(tokens, special, ids.get("mask")))
    except VocabError as error:
        why = str(error).partition("; ")[0]
        raise CheckpointError(f"{why}; copy its tokenizer again from where the weights are") from None
    if vocab.size > num_rows:
        raise CheckpointError(f"{folder}: its tokenizer has {vocab.size} tokens, but the model has {num_rows} rows for "
                              "them; copy both from one place")
    _check_special(vocab, special, ids, folder)
    notes = [] if vocab.size == num_rows else [
        f"of its {num_rows} rows of the vocabulary those from {vocab.size} on have no token, and are left out"]
    return {"config": _flags(vocab, folder), "vocabulary": vocab.identity, "notes": notes}


def _assumed(usual: str, num_rows: int, ids: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entries for a folder without a file of tokens."""
    vocab, missing = Vocab.from_file(usual), f"there is no {LINES} or {WHOLE} in it"
    if vocab.size != num_rows:
        note = f"{missing}: --vocab-file has to name its {num_rows} tokens"
        return {"config": {}, "lacks_vocabulary": True, "notes": [note]}
    _check_special(vocab, {}, ids, folder)
    note = f"{missing}: its {num_rows} tokens are taken to be those of {usual}"
    return {"config": {"vocab_file": usual}, "vocabulary": vocab.identity, "notes": [note]}


def _flags(vocab: Vocab, folder: Path) -> dict[str, Any]:
    """Our flags for a vocabulary: a family's name, else the file that has its tokens, else the folder."""
    file = folder / LINES
    is_whole = file.exists() and tuple(lines_of(file)) == vocab.tokens
    name = next((name for name in VOCABULARIES if Vocab.from_file(name).tokens == vocab.tokens),
                str((file if is_whole else folder).absolute()))
    return {"vocab_file": name, **({} if vocab.mask_token is None else {"mask_token": vocab.mask_token})}


def _mask_token(tokens: Sequence[str], special: Mapping[str, str], mask_id: Any) -> str | None:
    """The mask token that the tokenizer names, else that at `mask_id`; None for the one that a vocabulary goes by."""
    usual = next((name for name in SPECIAL_TOKENS["mask"] if name in tokens), None)
    has_id = usual is None and type(mask_id) is int and 0 <= mask_id < len(tokens)
    named = special.get("mask_token", tokens[mask_id] if has_id else None)
    return None if named == usual else named


def _check_special(vocab: Vocab, special: Mapping[str, str], ids: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError if the tokenizer or config.json has other special tokens than the vocabulary."""
    for role, found in ids.items():
        if found not in (None, known := getattr(vocab, f"{role}_id")):
            raise CheckpointError(f"{folder}: its configuration has {role}_token_id {str(found)[:40]}, its tokenizer "
                                  f"has {known} for it; copy both from one place")
    for role, names in _ROLES.items():
        said = {name: special[name] for name in names if name in special}
        ours = vocab.tokens[getattr(vocab, f"{role}_id")]
        if said and ours not in said.values():
            name, token = next(iter(said.items()))
            raise CheckpointError(f"{folder}: its tokenizer has {token} as {name}, where models here take {ours}; give "
                                  "one whose special tokens have the usual names")


def known_vocabulary(checkpoint: Checkpoint) -> Vocab | None:
    """The vocabulary of a model if the checkpoint says which it is and it is available here, else None."""
    given = checkpoint.state.get("config", {}).get("vocab_file")
    if "vocabulary" not in checkpoint.state and given not in VOCABULARIES and not (given and Path(given).exists()):
        return None
    try:
        return vocabulary_of(checkpoint)
    except CheckpointError:
        return None


def num_tokens_of(checkpoint: Checkpoint) -> int | None:
    """The number of tokens in a model's vocabulary, without padding; None if it is unknown.

    A checkpoint that does not say is assumed to have the default vocabulary if it has as many rows as that would have
    when padded for its tensor-parallel ranks.
    """
    known = known_vocabulary(checkpoint)
    if known is not None or "vocabulary" in checkpoint.state:
        return None if known is None else known.size
    default = Vocab.from_file().size
    num_tensor = checkpoint.state.get("layout", {}).get("tensor_model_parallel_size", 1)
    return default if checkpoint.model[WORDS].shape[0] == rows_for(default, num_tensor, checkpoint) else None


def vocabulary_of(checkpoint: Checkpoint) -> Vocab:
    """The vocabulary that a model was trained with; raises CheckpointError if it cannot be found.

    A checkpoint of another program may name a file that exists only on the machine where it was trained; then the
    default vocabulary is assumed.
    """
    config, identity = checkpoint.state.get("config", {}), checkpoint.state.get("vocabulary")
    if (kept := Vocab.of_state(checkpoint.state)) is not None:
        return kept
    given, mask_token = config.get("vocab_file"), config.get("mask_token")
    is_elsewhere = identity is None and given not in (None, *VOCABULARIES) and not Path(given).exists()
    failure = f"{given or 'the default'} holds other tokens than it did"
    for name in [None] if is_elsewhere else [given] if identity is None else [given, *VOCABULARIES]:
        try:
            vocab = Vocab.from_file(name, mask_token if name == given else None)
        except VocabError as error:
            failure = str(error)
            continue
        if identity in (None, vocab.identity):
            break
    else:
        raise CheckpointError(f"{checkpoint.path}: its vocabulary is not there ({failure}); put that file back")
    if (rows := checkpoint.model[WORDS].shape[0]) < vocab.size:
        raise CheckpointError(f"{checkpoint.path}: has {rows} rows for the {vocab.size} tokens of "
                              f"{given or 'the default vocabulary'}; it was trained with another one")
    return vocab
