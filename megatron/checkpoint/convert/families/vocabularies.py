"""The vocabulary of a model: a family's, or that of a file."""

from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.vocabulary import WORDS
from megatron.checkpoint.stored import Checkpoint
from megatron.config.data import VOCABULARIES
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError, VocabError

FILE = "vocab.txt"


def vocabulary_in(folder: Path, usual: str, num_rows: int) -> dict[str, Any]:
    """What a checkpoint's state says of it: "config" (its flag), "vocabulary" (its identity), "notes".

    `usual`: the family's name whose vocabulary a folder without vocab.txt has, if it has as many tokens. Raises
    CheckpointError where there are more tokens than `num_rows`, or they are no vocabulary of proteins.
    """
    path = folder / FILE
    notes = []
    try:
        vocab = Vocab.from_file(path if path.exists() else usual)
    except VocabError as error:
        raise CheckpointError(f"{error}: models here read proteins") from None
    name = next((name for name in VOCABULARIES if Vocab.from_file(name).tokens == vocab.tokens), str(path.absolute()))
    if not path.exists():
        if vocab.size != num_rows:
            return {"config": {}, "notes": [f"there is no {FILE} in it: --vocab-file has to name its {num_rows} "
                                            "tokens"]}
        notes = [f"there is no {FILE} in it: its {num_rows} tokens are taken to be those of {usual}"]
    if vocab.size > num_rows:
        raise CheckpointError(f"{path}: has {vocab.size} tokens, but the model has {num_rows} rows for them; copy both "
                              "from one place")
    return {"config": {"vocab_file": name}, "vocabulary": vocab.identity, "notes": notes}


def vocabulary_of(checkpoint: Checkpoint) -> Vocab:
    """The vocabulary of a model; raises CheckpointError where it is not that which it was trained with."""
    config, identity = checkpoint.state.get("config", {}), checkpoint.state.get("vocabulary")
    given, mask_token = config.get("vocab_file"), config.get("mask_token")
    names = [given] if identity is None else [given, *VOCABULARIES]
    failures = []
    for name in names:
        try:
            vocab = Vocab.from_file(name, mask_token if name == given else None)
        except VocabError as error:
            failures.append(str(error))
            continue
        if identity in (None, vocab.identity):
            break
    else:
        why = failures[0] if failures else f"{given or 'the default'} holds other tokens than it did"
        raise CheckpointError(f"{checkpoint.path}: its vocabulary is not there ({why}); put that file back")
    if (rows := checkpoint.model[WORDS].shape[0]) < vocab.size:
        raise CheckpointError(f"{checkpoint.path}: has {rows} rows for the {vocab.size} tokens of "
                              f"{given or 'the default vocabulary'}; it was trained with another one")
    return vocab
