"""A complete fine-tuning: loads the data, trains with each seed, and reports the results."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.claim import claimed
from megatron.checkpoint.contents import content_of
from megatron.checkpoint.loading import with_padding_of
from megatron.checkpoint.newest import open_newest
from megatron.checkpoint.places import METRICS_FILE, STATE, digest_of_weights, iterations
from megatron.checkpoint.store import in_order, read_state
from megatron.config.lora import LoraConfig
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.errors import CheckpointError, ConfigError, DataError
from megatron.files import write_json
from megatron.finetune.calibration import with_best_rate
from megatron.finetune.data.examples import TaskData, load_task
from megatron.finetune.data.labels import class_counts, class_weights
from megatron.finetune.data.record import shown_counts
from megatron.finetune.data.tasks import NUMBER, NUMBERS, WITHOUT_CLASSES
from megatron.finetune.flags import Flags, first_change, task_and_files
from megatron.finetune.heads import HeadSpec
from megatron.finetune.model import TASK_FILE, Described
from megatron.finetune.predictions.metrics import form_of, spread, with_spread
from megatron.finetune.progress import UNFINISHED, remove_unfinished
from megatron.finetune.training import REPORT, Job, fine_tune
from megatron.infer.pretrained import config_of, flags_of, vocab_of
from megatron.log import Log, number_of
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.compilation import wants_compilation
from megatron.parallel.mesh import Mesh
from megatron.parallel.sameness import SAME_FILES, check_same, check_same_flags
from megatron.train.setup.precision import with_precision_chosen
from megatron.train.setup.pytorch import configure_pytorch
from megatron.train.setup.ways import ways
from megatron.train.stop import StopRequests

Report = dict[str, Any]
_FILES = {"train": "training", "valid": "validation"}
HEADS = ("part", "measure", "proteins", "value", "95 % interval")


def run(flags: Flags, mesh: Mesh, log: Log) -> list[list[str]] | None:
    """Fine-tune with each seed and return the rows of a table with the columns HEADS. All ranks must call this
    together.

    SIGTERM, SIGUSR1, Ctrl-C and pretraining's flags that limit time make it save and return None; the next call
    continues. Raises a UserError for flags, data or checkpoints that do not fit.
    """
    requests, root = StopRequests(flags.others.get("exit_duration_in_mins")), Path(flags.others["save"])
    if len(flags.finetune.seeds) > 1 and any((root / name).exists() for name in (TASK_FILE, UNFINISHED)):
        raise ConfigError(f"--save {root} holds a run of one seed, whose report that of all --seeds would replace; "
                          "name a new folder")
    job, reports, folders = _job(flags, mesh, log, requests), dict[int, Report](), _folders(flags)
    with claimed(str(root), mesh, log) as claim, requests.listening():
        job = replace(job, claim=claim)
        done = {seed: all_gather_object(_done(folder, job.identity, seed), mesh.world)[0]
                for seed, folder in folders.items()}
        if flags.finetune.calibrate_lr and not all(done.values()):
            found = with_best_rate(job, root)
            if found is None:
                return None
            job = found
        for seed, folder in folders.items():
            if done[seed] is not None:
                log.line(f"seed {seed} is done already: {folder}")
                if log.is_speaker:
                    remove_unfinished(folder)  # where a run died between its report and this
            report = done[seed] or fine_tune(job, seed, folder)
            if report is None:
                return None
            reports[seed] = report
        if log.is_speaker and len(reports) > 1:
            write_json(root / REPORT, {"seeds": {str(seed): report for seed, report in reports.items()},
                                       "spread": spreads(list(reports.values()))})
    return rows_of(list(reports.values()))


def described(flags: Flags, data: TaskData, num_ends: int) -> Described:
    """What a model learns from this data; raises ConfigError if class weights are asked for and there are no classes.
    """
    space, labels = data.space, [example.label for example in data.parts["train"]]
    spec = HeadSpec(space.kind, max(1, len(space.class_names)), num_ends, flags.finetune.pooling,
                    flags.finetune.head_dropout)
    if space.kind in (NUMBER, NUMBERS):
        numbers = _that_count(labels)
        spec = replace(spec, mean=float(np.mean(numbers)), deviation=float(np.std(numbers)))
    if flags.task.class_weights == "balanced":
        if space.kind in WITHOUT_CLASSES:
            raise ConfigError(f"--class-weights balanced is for classes, and the labels are of the kind {space.kind}; "
                              "leave it out")
        spec = replace(spec, class_weights=tuple(map(float, class_weights(space, labels))))
    return Described(data.task, space, spec, flags.lora)


def spreads(reports: list[Report]) -> dict[str, dict[str, list[float]]]:
    """The mean over seeds, and the standard deviation, of each metric of each part."""
    return {part: {name: list(spread([_number(report["measures"][part][name][0]) for report in reports]))
                   for name in names} for part, names in _measured_by_all(reports).items()}


def rows_of(reports: list[Report]) -> list[list[str]]:
    """The metrics of each part: with intervals for one seed, as mean and spread for several."""
    rows = []
    for part, names in _measured_by_all(reports).items():
        measures = reports[0]["measures"][part]
        for name in names:
            values, form = [_number(report["measures"][part][name][0]) for report in reports], form_of(name)
            ends = [] if len(reports) > 1 else [_number(end) for end in measures[name][1:]]
            rows.append([part, name, f"{reports[0]['proteins'][part]:,}", with_spread(values, form=form),
                         "–" if not ends or np.isnan(ends[0]) else f"{ends[0]:{form}} to {ends[1]:{form}}"])
    return rows


def _measured_by_all(reports: list[Report]) -> dict[str, list[str]]:
    """The metrics of each part that every report has: one of an older version may have fewer."""
    return {part: [name for name in measures if all(name in report["measures"][part] for report in reports)]
            for part, measures in reports[0]["measures"].items()}


def _job(flags: Flags, mesh: Mesh, log: Log, requests: StopRequests) -> Job:
    checkpoint = open_newest(flags.others["load"], mesh.world, log, with_optimizer=False)
    if checkpoint is None:
        raise CheckpointError(f"--load {flags.others['load']} holds no checkpoint; give the folder of a run")
    settings = flags.config(flags_of(checkpoint), mesh.data.size)
    check_same_flags([*settings.sections(), ("task", flags.task), ("finetune", flags.finetune),
                      ("lora", flags.lora or LoraConfig())], mesh.world)
    config = config_of(checkpoint, "fp32")
    vocab = vocab_of(checkpoint, config)
    checkpoint = with_padding_of(checkpoint, vocab, vocab.padded_size(config.model), log)
    task, files = task_and_files(flags.task_name, flags.task)
    data = load_task(task, files, ResidueTokenizer(vocab), log, flags.task.skip_bad_records)
    check_data(data, files)
    content, of_load = "the content of the task's files", "the content of --load"
    check_same({content: data.digest(), of_load: content_of(checkpoint)},
               {content: files["train"], of_load: flags.others["load"]}, mesh.world, SAME_FILES)
    for part, number, other in data.overlaps():
        log.line(f"note: {number:,} of {len(data.parts[part]):,} {part} proteins have a sequence that is in the "
                 f"{_FILES[other]} file too; measures on them say little of other proteins")
    num_sequences, num_proteins = data.contradictions()
    if num_sequences:
        log.line(f"note: the training file has {number_of(num_sequences, 'sequence')} with labels that differ, in "
                 f"{num_proteins:,} proteins; all of them are learnt from")
    if "valid" not in data.parts:
        log.line("note: without a validation file nothing chooses the best weights: the last ones are kept")
    log.line(f"{number_of(len(data.parts['train']), 'protein')} to learn from, {_of_labels(data)}")
    identity = {**flags.identity(), "data": data.digest(), "weights": digest_of_weights(checkpoint.path)}
    return Job(_settled(flags, flags_of(checkpoint), _begun(flags, mesh), mesh, log), identity, data,
               described(flags, data, config.data.num_ends), vocab, checkpoint, mesh, log, requests)


def _of_labels(data: TaskData) -> str:
    """The kind of the labels, in words, and how many of the training labels are of each class."""
    names = data.space.class_names
    told = f"labels of the kind {data.space.kind}"
    if not names:
        return told
    counts = class_counts(data.space, [example.label for example in data.parts["train"]])
    return f"{told}, {len(names):,} classes: {shown_counts(names, counts.tolist())}"


def _begun(flags: Flags, mesh: Mesh) -> Mapping[str, Any] | None:
    """Pretraining's flags as this run had them so far, with any of its seeds; None where none has saved."""
    found = None
    for folder in _folders(flags).values():
        for place in (folder / UNFINISHED, folder):
            with suppress(CheckpointError, IndexError):
                state = read_state(in_order(place)[1][0] / STATE)
                found = found or state.get("settings") or state.get("config")
    return all_gather_object(found, mesh.world)[0]


def _folders(flags: Flags) -> dict[int, Path]:
    """The folder of each seed."""
    root, seeds = Path(flags.others["save"]), flags.finetune.seeds
    return {seed: root if len(seeds) == 1 else root / f"seed-{seed}" for seed in seeds}


def _settled(flags: Flags, saved: Mapping[str, Any], begun: Mapping[str, Any] | None, mesh: Mesh, log: Log) -> Flags:
    """The flags with `--precision auto` resolved, after configuring PyTorch as they ask; raises ConfigError.

    `saved`: the flags of --load; `begun`: those of this run where it was begun before, whose precision it keeps.
    """
    config = flags.config(saved, mesh.data.size)
    configure_pytorch(config, mesh)
    config = with_precision_chosen(config, begun, mesh, log)
    log.line(ways(config, mesh, wants_compilation(config, mesh.device)))
    if "precision" not in flags.others:
        return flags
    return replace(flags, others={**flags.others, "precision": None, "bf16": config.precision.bf16})


def _done(folder: Path, identity: Mapping[str, Any], seed: int) -> Report | None:
    """The report of this seed if an earlier run of the same command finished it.

    Raises ConfigError if the report is another command's, or if the folder holds a run of another kind.
    """
    path = folder / REPORT
    if not path.exists():
        is_begun = any((folder / name).exists() for name in (TASK_FILE, UNFINISHED))
        if not is_begun and (iterations(folder) or (folder / METRICS_FILE).exists()):
            raise ConfigError(f"--save {folder} holds another run, which would be lost; name a new folder")
        return None
    report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    change = f"--seeds were {' '.join(report['seeds'])}" if "seeds" in report else first_change(
        {**report.get("flags", {}), "seed": report.get("seed")}, {**identity, "seed": seed})
    if change is not None:
        raise ConfigError(f"--save {folder} holds the report of another run: {change}; name a new folder")
    return dict(report)


def check_data(data: TaskData, files: Mapping[str, str]) -> None:
    """Raises DataError for a part without proteins, and for training numbers that are all equal."""
    for part, examples in data.parts.items():
        if not examples:
            raise DataError(f"{files[part]}: holds no protein")
    if data.space.kind in (NUMBER, NUMBERS):
        numbers = _that_count([example.label for example in data.parts["train"]])
        if not len(numbers):
            raise DataError(f"{files['train']}: no residue of its proteins has a number; there is nothing to learn")
        if numbers.min() == numbers.max():
            raise DataError(f"{files['train']}: all labels of the training file are {numbers[0]:g}; there is nothing "
                            "to learn")


def _that_count(labels: Sequence[float | np.ndarray]) -> np.ndarray:
    """The numbers of all proteins, or of all their residues that count, float64 [numbers]."""
    numbers = np.concatenate([np.atleast_1d(label) for label in labels]).astype(np.float64)
    return numbers[~np.isnan(numbers)]


def _number(value: float | None) -> float:
    return np.nan if value is None else value
