"""Predictions of a fine-tuned model for the proteins of a file, as CSV or JSON lines."""

import csv
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.failures import writable
from megatron.checkpoint.newest import open_newest
from megatron.config import Config
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.files import replacing
from megatron.finetune.data.batches import PackedExamples
from megatron.finetune.data.examples import Example, read_proteins
from megatron.finetune.data.kinds import SEPARATOR
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS
from megatron.finetune.model import Described
from megatron.finetune.predictions.collected import predictions, settings_of
from megatron.infer.contacts.output import best_pairs
from megatron.infer.pretrained import config_of, vocab_of
from megatron.log import Log
from megatron.parallel.mesh import Mesh

ENDINGS = (".csv", ".jsonl")
_DIGITS = 6


def predict(folder: str, file: str, output: str, precision: str, skips: bool, mesh: Mesh, log: Log, *,
            sequence_key: str | None = None, name_key: str | None = None, overwrite: bool = False) -> None:
    """Write the predictions of the model in `folder` for each protein of `file`; all ranks must call this together.

    `skips`: leave out records that are not proteins. Raises a UserError for input that cannot be read, and for an
    output with an unknown ending, that cannot be written, or that exists already unless `overwrite` is set.
    """
    path = Path(output)
    if path.suffix not in ENDINGS or path.is_dir():
        raise ConfigError(f"{output}: the output ends in {' or '.join(ENDINGS)}, and is no folder")
    if path.is_file() and not overwrite:
        raise ConfigError(f"{output} is there already; give another output, or --overwrite")
    if log.is_speaker:
        with writable(path):  # said now rather than behind hours of work
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
    described = Described.read(Path(folder))
    checkpoint = open_newest(folder, mesh.world, log, with_optimizer=False)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint, which a fine-tuning has at its end; give what --save of "
                              "tools/finetune.py named")
    config = config_of(checkpoint, precision, mesh.tensor.size)
    vocab = vocab_of(checkpoint, config)
    proteins = read_proteins(file, described.task, ResidueTokenizer(vocab), skips, log, sequence_key,
                             name_key)
    engine = described.open(_with_rows_for(proteins, config, mesh), mesh, vocab, checkpoint)
    packed = PackedExamples(proteins, described.space, vocab, settings_of(engine, 0), is_training=False)
    log.line(packed.describe(file))
    values = predictions(engine, described.head, packed, log, "predicting", partial(best_pairs, threshold=None))
    if log.is_speaker:
        _write(path, described.space, proteins, values)
    log.line(f"{len(proteins):,} predictions in {output}")


def _with_rows_for(proteins: list[Example], config: Config, mesh: Mesh) -> Config:
    """The configuration with rows as long as the longest protein, if the model has enough positions, and one row per
    rank.
    """
    longest = max(len(protein.ids) for protein in proteins) + config.data.num_ends
    if config.model.position_embedding_type == "learned_absolute":
        longest = min(longest, config.model.max_position_embeddings)
    seq_length = max(config.data.seq_length or 0, longest)
    return replace(config, data=replace(config.data, seq_length=seq_length),
                   training=replace(config.training, micro_batch_size=1, global_batch_size=mesh.data.size))


def _write(path: Path, space: LabelSpace, proteins: list[Example], values: list[Any]) -> None:
    is_table = path.suffix == ".csv"
    records = ({"name": protein.name, **_record(space, value, is_table)} for protein, value in
               zip(proteins, values, strict=True))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if not is_table:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            return
        writer = csv.writer(file, lineterminator="\n")
        has_columns = space.kind in (CLASS, CLASSES)
        writer.writerow(["name", "prediction", *(space.class_names if has_columns else ())])
        for record in records:
            probabilities = record["probabilities"].values() if has_columns else ()
            writer.writerow([record["name"], _as_cell(record["prediction"]), *probabilities])


def _record(space: LabelSpace, value: Any, is_table: bool) -> dict[str, Any]:
    """A protein's prediction, with the probabilities of classes. Residues are numbered from 1.

    `is_table`: leave out probabilities of each residue, for which a table has no room. `value` for contacts: the list
    of pairs.
    """
    names = space.class_names
    if space.kind == NUMBER:
        return {"prediction": value}
    if space.kind == NUMBERS:
        return {"prediction": [_rounded(one) for one in value]}
    if space.kind == CONTACTS:
        return {"prediction": [[i, j] for i, j, _ in value],
                "probabilities": [_rounded(probability) for _, _, probability in value]}
    if space.kind in (CLASS, CLASSES):
        chosen = names[int(value.argmax())] if space.kind == CLASS else [
            name for name, probability in zip(names, value, strict=True) if probability >= 0.5]
        return {"prediction": chosen, "probabilities": {name: _rounded(one) for name, one in
                                                        zip(names, value, strict=True)}}
    classes = [names[place] for place in value.argmax(1)]
    prediction = "".join(classes) if all(len(name) == 1 for name in names) else classes
    if is_table:
        return {"prediction": prediction}
    return {"prediction": prediction, "probabilities": {name: [_rounded(one) for one in value[:, place]]
                                                        for place, name in enumerate(names)}}


def _as_cell(prediction: Any) -> Any:
    """A list as one text, separated as in labels of training files; a pair of residues is joined by a dash.

    An empty list is the separator alone, which labels read as a protein of no class.
    """
    if not isinstance(prediction, list):
        return prediction
    cells = ["-".join(map(str, part)) if isinstance(part, list) else str(part) for part in prediction]
    return SEPARATOR.join(cells) or SEPARATOR


def _rounded(probability: float) -> float:
    return round(float(probability), _DIGITS)
