"""Writes small files of labelled proteins, and reads them as fine-tuning does."""

import json
import pickle
from pathlib import Path

import pytest

from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import DataError
from megatron.finetune.data.examples import TaskData, load_task
from megatron.finetune.data.tasks import task_of
from tests.unit.protein_files import write_lmdb

VOCAB = Vocab.from_file()
TOKENIZER = ResidueTokenizer(VOCAB)


def json_lines(path: Path, records: list[dict]) -> Path:
    """Write the records as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lmdb(path: Path, records: list[dict]) -> Path:
    """Write the records as an LMDB folder of TAPE; returns the path."""
    return write_lmdb(path, [pickle.dumps(record) for record in records], len(records))


def loaded(tmp_path: Path, records: list[dict], name: str = "own", others: list[dict] | None = None,
           **keys) -> TaskData:
    """The task data read from `records`, the training part, and `others`, the validation part, as JSON lines.

    `log`, `skips`: as in `load_task`; the other `keys` as in `task_of`.
    """
    reading = {name: keys.pop(name) for name in ("log", "skips") if name in keys}
    files = {"train": str(json_lines(tmp_path / "train.jsonl", records))}
    if others is not None:
        files["valid"] = str(json_lines(tmp_path / "valid.jsonl", others))
    return load_task(task_of(name, **keys), files, TOKENIZER, **reading)


def labels(data: TaskData, part: str = "train") -> list:
    """The labels of a part, in order."""
    return [example.label for example in data.parts[part]]


def refused(tmp_path: Path, *arguments, **keys) -> str:
    """The message of the DataError that `loaded` raises for these arguments, one line, without the folder."""
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, *arguments, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")
