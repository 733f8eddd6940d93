"""From a configuration to a run that is ready to train: data, model, optimizer, and the state of a checkpoint."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, content_of
from megatron.checkpoint.loading import load_average, load_model, load_optimizer, with_padding_of
from megatron.checkpoint.saving import parts_of
from megatron.config import CheckpointConfig, Config
from megatron.config.declaration import shown
from megatron.data.batches.batch import BatchShape, batch_shape
from megatron.data.batches.order import Windows
from megatron.data.corpus.split import shares_of
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.blend import BlendedDataset
from megatron.data.rows.dataset import Splits, build_datasets
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.model.protein_model import ProteinModel
from megatron.optim.schedule import Schedule
from megatron.parallel.mesh import Mesh
from megatron.parallel.placement import Part
from megatron.parallel.sameness import SAME_FILES, check_same
from megatron.train.setup.precision import with_precision_chosen
from megatron.train.setup.pytorch import configure_pytorch
from megatron.train.setup.resume import (
    differences,
    facts_of,
    find_checkpoint,
    origin_of,
    refuse_changes,
    started_again,
)
from megatron.train.setup.schedule import chosen_schedule
from megatron.train.setup.ways import ways
from megatron.train.state import BatchSizes, TrainState
from megatron.train.step.engine import Engine, build_engine, stream_of
from megatron.train.step.graph import check_graph
from megatron.train.step.meters import Totals
from megatron.train.step.spikes import SpikeJudge


@dataclass
class Run:
    """Everything that training works on."""

    config: Config
    mesh: Mesh
    log: Log
    data: Splits
    vocab: Vocab
    engine: Engine
    schedule: Schedule
    sizes: BatchSizes
    state: TrainState
    judge: SpikeJudge
    began_from: str | None  # --load of the start that gave the run its first weights; None: they came from the seed
    taken_from: str | None  # the folder of the other run that it first loaded, with its progress or without
    meters: dict[str, Any]  # state of the meters: the steps since the last log event before a resumed run was stopped
    is_evaluation_due: bool = False  # the run was stopped before the evaluation that was due after its last step
    is_other_evaluated: bool = False  # on rank 0: a complete run is evaluated on other data than before

    @cached_property
    def shape(self) -> BatchShape:
        """The shape of every micro-batch from the present step on."""
        mesh = self.mesh
        return batch_shape(self.data, self.config.training.micro_batch_size,
                           stream_of(self.config, mesh).token_multiple, mesh.context.rank, mesh.context.size,
                           self.state.sample_at(self.state.consumed_samples))

    def parts(self) -> dict[str, Part]:
        """This rank's part of each tensor of a checkpoint saved now, by name."""
        moments = {} if self.config.checkpoint.no_save_optim else self.engine.optimizer.state()
        average = self.engine.average
        return parts_of(self.engine.model.parameters, moments, None if average is None else average.tensors)

    def facts(self) -> dict[str, Any]:
        """The rest of a checkpoint saved now: all that `build` needs besides tensors to resume the run; JSON values."""
        return {"iteration": self.state.iteration, "progress": self.state.progress,
                "began_from": self.began_from, "taken_from": self.taken_from,
                "loss_scale": self.engine.loss_scale.state(),
                "fp8_amaxes": self.engine.amaxes.state(),
                "schedule": asdict(self.schedule),
                "is_evaluation_due": self.is_evaluation_due,
                "guards": {"left_out": self.state.left_out, "num_rewinds": self.state.num_rewinds,
                           "judge": self.judge.state()},
                **({} if self.engine.average is None else {"ema_steps": self.engine.average.num_steps}),
                **facts_of(self.config, self.vocab, self.data, self.sizes.final)}


def build(config: Config, mesh: Mesh, log: Log, left_out: Windows = (), num_rewinds: int = 0) -> Run:
    """A run ready to train, resumed if `--load` holds a checkpoint; raises a UserError for whatever does not fit.

    `left_out`: samples not to train on. `num_rewinds`: how often the run has gone back to a checkpoint because of such.
    """
    if config.data.data_path is None:
        raise ConfigError("--data-path is missing; give the prefix of the .bin and .idx that tools/preprocess_data.py "
                          "wrote")
    check_graph(config, mesh)
    configure_pytorch(config, mesh)
    sizes = BatchSizes(config.training, mesh.data.size)
    vocab = Vocab.from_file(config.data.vocab_file, config.data.mask_token)
    config = started_again(config, mesh.world, log)
    checkpoint = _checkpoint(config, vocab, mesh, log)
    resumed_from = None if config.checkpoint.finetune else checkpoint
    config = with_precision_chosen(config, resumed_from.state["config"] if resumed_from else None, mesh, log)
    schedule = chosen_schedule(config, sizes, resumed_from, log)
    data = _build_data(config, vocab, log)
    _check_same_files(config, vocab, data, checkpoint, mesh)
    engine = _build_engine(config, mesh, vocab, checkpoint, schedule.lr)
    log.line(ways(config, mesh, engine.is_compiled))
    # Steps to be skipped are judged on the device before the update, others on the CPU when they are logged.
    judge = SpikeJudge(config.guards, mesh.device if config.guards.on_spike == "skip" else torch.device("cpu"),
                       engine.loss_scale.is_dynamic)
    run = Run(config, mesh, log, data, vocab, engine, schedule, sizes, TrainState(), judge,
              *_origins(config.checkpoint, checkpoint), {"steps": [], "elapsed_s": 0.0, "totals": asdict(Totals())})
    if resumed_from is not None:
        _go_on(run, resumed_from)
    run.state.leave_out([*config.guards.left_out, *left_out])
    run.state.num_rewinds = max(run.state.num_rewinds, num_rewinds)
    return run


def _checkpoint(config: Config, vocab: Vocab, mesh: Mesh, log: Log) -> Checkpoint | None:
    """The checkpoint of `--load`, if there is one: it fits the flags, and its vocabulary is padded as this run's is."""
    checkpoint = find_checkpoint(config.checkpoint, config.optimizer.optimizer, mesh.world, log)
    if checkpoint is None:
        return None
    refuse_changes(config, vocab, checkpoint)
    return with_padding_of(checkpoint, vocab, vocab.padded_size(config.model), log)


def _build_data(config: Config, vocab: Vocab, log: Log) -> Splits:
    """The training, validation and test rows; logs what they hold, and which flags have no effect on them."""
    data = build_datasets(config.data, vocab, config.training.seed)
    for part in (data.train, data.valid, data.test):
        if part is not None and log.is_speaker:  # it reads the lengths of all proteins
            log.line(part.describe())
    _, *shares = shares_of(config.data.split)
    missing = [name for name, part, share in zip(("validation", "test"), (data.valid, data.test), shares, strict=True)
               if part is None and share]
    if missing:
        log.line(f"note: of so few proteins --split {config.data.split} leaves none for {' and '.join(missing)}: there "
                 f"is no {' and no '.join(missing)} loss; give larger shares, such as 80,10,10")
    if config.checkpoint.save is None:
        log.line("note: without --save nothing of this run is kept")
    if config.training.eval_each and not isinstance(data.train, BlendedDataset):
        log.line("note: --eval-each changes nothing without several weighted corpora in --data-path")
    return data


def _check_same_files(config: Config, vocab: Vocab, data: Splits, checkpoint: Checkpoint | None, mesh: Mesh) -> None:
    """Raises ConfigError where ranks have different vocabularies, data or checkpoints; a collective."""
    if mesh.world.size == 1:
        return
    facts, options = facts_of(config, vocab, data, 0), config.data
    files = {"--vocab-file": (facts["vocabulary"], options.vocab_file),
             "--data-path": (facts["data"], shown(options.data_path)),
             "--cluster-file": (facts["clusters"], options.cluster_file),
             "--load": (content_of(checkpoint), config.checkpoint.load)}
    check_same({f"the content of {name}": content for name, (content, _) in files.items()},
               {f"the content of {name}": f"{path}" for name, (_, path) in files.items()}, mesh.world, SAME_FILES)


def _origins(options: CheckpointConfig, checkpoint: Checkpoint | None) -> tuple[str | None, str | None]:
    """`began_from` and `taken_from` of a `Run` that loads this checkpoint."""
    saved = {} if checkpoint is None else checkpoint.state
    began_from = options.load if options.finetune else saved.get("began_from")
    is_of_other_run = checkpoint is not None and origin_of(options.load) != origin_of(options.save or options.load)
    return began_from, origin_of(options.load) if is_of_other_run else saved.get("taken_from")


def _go_on(run: Run, checkpoint: Checkpoint) -> None:
    """Restore progress, loss scale, meters and optimizer from the checkpoint, and log which flags have changed."""
    config, engine, saved = run.config, run.engine, checkpoint.state
    guards = saved.get("guards", {})
    run.state = TrainState.from_saved(saved["progress"], guards)
    run.meters = saved.get("meters", run.meters | {"totals": None})
    run.is_evaluation_due = bool(saved.get("is_evaluation_due"))
    if saved["config"].get("fp16", config.precision.fp16):  # in other precisions the scale was always 1
        engine.loss_scale.load_state(saved["loss_scale"])
    engine.amaxes.load_state(saved.get("fp8_amaxes", {}))
    if checkpoint.optimizer is not None:
        engine.optimizer.load_state(load_optimizer(engine.model.parameters, checkpoint))
    if engine.average is not None and checkpoint.average is not None:
        load_average(engine.average.tensors, engine.model.parameters, checkpoint)
        engine.average.go_on(saved.get("ema_steps", run.state.iteration))
    facts = facts_of(config, run.vocab, run.data, run.sizes.final)
    changes = differences(config, facts, saved)
    for line in changes:
        run.log.line(line)
    if "judge" in guards and not changes:  # after a change, earlier losses say nothing about later ones
        run.judge.load_state(guards["judge"])
    training = config.training
    if training.train_iters is not None and facts["config"]["global_batch_size"] != saved["config"].get(
            "global_batch_size"):
        end = run.state.consumed_samples + (training.train_iters - run.state.iteration) * run.sizes.final
        run.log.line(f"note: --train-iters {training.train_iters} now ends after {end} samples, and the "
                     f"learning-rate schedule after {run.schedule.decay_samples}")


def _build_engine(config: Config, mesh: Mesh, vocab: Vocab, checkpoint: Checkpoint | None, peak_lr: float) -> Engine:
    """The engine with the checkpoint's weights, or without a checkpoint with weights drawn from the seed."""
    size = vocab.padded_size(config.model)
    if checkpoint is None:
        return build_engine(config, mesh, size, mask_id=vocab.mask_id, peak_lr=peak_lr)
    with torch.device("meta"):
        whole = ProteinModel(config.model, config.precision, size, mask_id=vocab.mask_id)
    names = {name for name, _ in whole.named_parameters()}
    return build_engine(config, mesh, size, fill=lambda parameters: load_model(parameters, checkpoint, names),
                        mask_id=vocab.mask_id, peak_lr=peak_lr)
