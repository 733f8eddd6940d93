"""Finds out which vocabulary a model was trained with: that of its family, or that of a file."""

from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.vocabulary import WORDS, rows_for
from megatron.checkpoint.stored import Checkpoint
from megatron.config.data import VOCABULARIES
from megatron.data.corpus.vocab import SPECIAL_TOKENS, Vocab
from megatron.errors import CheckpointError, VocabError

FILE = "vocab.txt"


def vocabulary_in(folder: Path, usual: str, num_rows: int, mask_id: Any) -> dict[str, Any]:
    """The entries of a checkpoint's state on the vocabulary of a folder of transformers.

    They are "config" (our flags for it), "vocabulary" (its identity) and "notes"; if the vocabulary is unknown,
    "lacks_vocabulary" replaces "vocabulary". `usual`: the vocabulary to assume without a vocab.txt, if its number of
    tokens is `num_rows`; `mask_id`: the mask's id in config.json, or None. Raises CheckpointError if the tokens are not
    a protein vocabulary, are more than `num_rows`, or have another mask.
    """
    path = folder / FILE
    notes = []
    try:
        vocab = Vocab.from_file(path if path.exists() else usual, _mask_token(path, mask_id))
    except VocabError as error:
        why = str(error).partition("; ")[0]
        raise CheckpointError(f"{why}; copy {FILE} again from where the weights are") from None
    name = next((name for name in VOCABULARIES if Vocab.from_file(name).tokens == vocab.tokens), str(path.absolute()))
    if not path.exists():
        if vocab.size != num_rows:
            note = f"there is no {FILE} in it: --vocab-file has to name its {num_rows} tokens"
            return {"config": {}, "lacks_vocabulary": True, "notes": [note]}
        notes = [f"there is no {FILE} in it: its {num_rows} tokens are taken to be those of {usual}"]
    if vocab.size > num_rows:
        raise CheckpointError(f"{path}: has {vocab.size} tokens, but the model has {num_rows} rows for them; copy both "
                              "from one place")
    if mask_id not in (None, vocab.mask_id):
        raise CheckpointError(f"{folder}: its configuration has the mask at {str(mask_id)[:40]}, {path.name} at "
                              f"{vocab.mask_id}; copy both from one place")
    named = {} if vocab.mask_token is None else {"mask_token": vocab.mask_token}
    return {"config": {"vocab_file": name, **named}, "vocabulary": vocab.identity, "notes": notes}


def _mask_token(path: Path, mask_id: Any) -> str | None:
    """The token at line `mask_id` of a vocabulary file that has no mask token by name; else None."""
    try:
        tokens = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    is_named = bool({*SPECIAL_TOKENS["mask"]} & {token.strip() for token in tokens})
    return tokens[mask_id].strip() if not is_named and type(mask_id) is int and 0 <= mask_id < len(tokens) else None


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
