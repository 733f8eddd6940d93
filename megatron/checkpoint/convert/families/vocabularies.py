"""The vocabulary of a model: a family's, or that of a file."""

from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.vocabulary import WORDS, rows_for
from megatron.checkpoint.stored import Checkpoint
from megatron.config.data import VOCABULARIES
from megatron.data.corpus.vocab import SPECIAL_TOKENS, Vocab
from megatron.errors import CheckpointError, VocabError

FILE = "vocab.txt"


def vocabulary_in(folder: Path, usual: str, num_rows: int, mask_id: Any) -> dict[str, Any]:
    """What a checkpoint's state says of it: "config" (its flag), "vocabulary" (its identity), "notes".

    Where nothing tells which it is, "lacks_vocabulary" stands in place of the second. `usual`: the family's name whose
    vocabulary a folder without vocab.txt has, if it has as many tokens; `mask_id`: of the mask, where the configuration
    says it. Raises CheckpointError where the tokens are no vocabulary of proteins, are more than `num_rows`, or have
    another mask.
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
    """The token at `mask_id` of a file of which none is the mask by its name."""
    try:
        tokens = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    is_named = bool({*SPECIAL_TOKENS["mask"]} & {token.strip() for token in tokens})
    return tokens[mask_id].strip() if not is_named and type(mask_id) is int and 0 <= mask_id < len(tokens) else None


def known_vocabulary(checkpoint: Checkpoint) -> Vocab | None:
    """The vocabulary of a model where it tells which it is, and that is here; else None."""
    given = checkpoint.state.get("config", {}).get("vocab_file")
    if "vocabulary" not in checkpoint.state and given not in VOCABULARIES and not (given and Path(given).exists()):
        return None
    try:
        return vocabulary_of(checkpoint)
    except CheckpointError:
        return None


def num_tokens_of(checkpoint: Checkpoint) -> int | None:
    """How many rows of a model's vocabulary are no padding, as far as is known.

    Another program's files that do not tell are taken to have the default's, if they have rows as its ranks would.
    """
    known = known_vocabulary(checkpoint)
    if known is not None or "vocabulary" in checkpoint.state:
        return None if known is None else known.size
    default = Vocab.from_file().size
    num_tensor = checkpoint.state.get("layout", {}).get("tensor_model_parallel_size", 1)
    return default if checkpoint.model[WORDS].shape[0] == rows_for(default, num_tensor, checkpoint) else None


def vocabulary_of(checkpoint: Checkpoint) -> Vocab:
    """The vocabulary of a model; raises CheckpointError where it is not that which it was trained with.

    What another program wrote may name a file of its own machine: then it is the default, as where it is trained on.
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
