"""The model in its parallel layout, with pipeline and optimizer: all of a run but its data, its log and its progress.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.optim.average import WeightAverage
from megatron.optim.optimizer import Optimizer, StepOutcome
from megatron.optim.scaling import LossScale
from megatron.parallel.compilation import compile_blocks, wants_compilation
from megatron.parallel.data.data_parallel import data_parallel
from megatron.parallel.data.replicated import DataParallel
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline.partition import stages_of_rank
from megatron.parallel.pipeline.run import Pipeline
from megatron.parallel.tensor.amax_history import AmaxHistory
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.stream import Stream
from megatron.train.step.freed_memory import keep_freed_memory


@dataclass(frozen=True)
class Engine:
    """This rank's part of the model, and everything that runs and updates it."""

    config: Config
    mesh: Mesh
    padded_vocab_size: int  # as one tensor rank alone would pad it
    stages: list[ProteinModel]  # the model's stages on this pipeline rank, as plain modules
    model: DataParallel  # wraps the stages: runs them, and replicates or shards their parameters
    pipeline: Pipeline
    optimizer: Optimizer
    average: WeightAverage | None  # with --ema
    compute_copies: ComputeCopies  # of weights, in the compute dtype
    amaxes: AmaxHistory  # of FP8 with delayed scaling
    loss_scale: LossScale
    is_compiled: bool  # blocks run under torch.compile

    @property
    def skips_filler(self) -> bool:
        """Whether the filler at the end of micro-batches may be cut off: on CPUs, where no shape has to be fixed.

        Fixed shapes save kernel launches and graphs on GPUs only, and the rows of a small corpus may be mostly filler.
        Not in FP8, where scales shared by blocks of tokens must be the same in every layout.
        """
        mesh = self.mesh
        is_free = not self.is_compiled and self.config.precision.fp8 is None
        return mesh.device.type == "cpu" and mesh.pipeline.size == mesh.context.size == 1 and is_free

    def update(self, learning_rate: float | None, is_normal: Callable[[Tensor], Tensor] | None = None) -> StepOutcome:
        """The optimizer's step, followed by an update of the average and of the weights' copies.

        The arguments are those of `Optimizer.step`.
        """
        outcome = self.optimizer.step(learning_rate, self.loss_scale, is_normal)
        if self.average is not None:
            self.average.update(outcome.is_taken)
        self.compute_copies.refresh()
        return outcome

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model computes with the average of the weights; all ranks enter and leave together."""
        assert self.average is not None
        try:
            with self.average.in_place():
                self.refresh_compute_weights()
                yield
        finally:
            self.refresh_compute_weights()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which the model is in evaluation mode, without dropout."""
        try:
            for stage in self.stages:
                stage.eval()
            yield
        finally:
            for stage in self.stages:
                stage.train()

    def refresh_compute_weights(self) -> None:
        """Make forward passes use the parameters' present values, after something other than `update` changed them."""
        self.model.reshard()
        self.compute_copies.refresh()


Fill = Callable[[Mapping[str, nn.Parameter]], None]
MakeStage = Callable[..., ProteinModel]


def build_engine(config: Config, mesh: Mesh, padded_vocab_size: int, fill: Fill | None = None,
                 is_frozen: Callable[[str], bool] = lambda name: False, mask_id: int | None = None,
                 make_stage: MakeStage = ProteinModel, peak_lr: float | None = None) -> Engine:
    """This rank's part of the engine, on the mesh's device.

    Parameters are built without values and then filled in place, by `fill` or else from the seed, so that no rank ever
    holds more than its own part and one tensor of the source. `is_frozen`: whether the parameter of that name is not
    trained. `mask_id`: the id of [MASK]. `make_stage`: builds a stage, with ProteinModel's arguments. `peak_lr`: the
    schedule's, to which the peaks of parameter groups are in proportion; by default `--lr`.
    """
    if mesh.device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        stages = build_stages(config, mesh, padded_vocab_size, mask_id, make_stage)
    for name, parameter in (named for stage in stages for named in stage.named_parameters()):
        parameter.requires_grad_(parameter.requires_grad and not is_frozen(name))
    if wants_compilation(config, mesh.device):
        compile_blocks((block for stage in stages for block in stage.blocks()), config.parallel)
    model = data_parallel(stages, ProteinModel.blocks, mesh, config.parallel, compute_dtype(config.precision))
    if fill is not None:
        fill(model.parameters)
    else:
        initialise(model.parameters, config.training.seed)
    return with_optimizer(config, mesh, padded_vocab_size, stages, model, peak_lr)


def stream_of(config: Config, mesh: Mesh) -> Stream:
    """How the tokens of the residual stream are split in this layout."""
    return Stream(mesh.tensor, config.parallel.sequence_parallel, mesh.context)


def build_stages(config: Config, mesh: Mesh, padded_vocab_size: int, mask_id: int | None = None,
                 make_stage: MakeStage = ProteinModel) -> list[ProteinModel]:
    """This rank's part of the model's stages on its pipeline rank, without values."""
    stream = stream_of(config, mesh)
    stages = stages_of_rank(config.model.num_layers, config.parallel, mesh.pipeline.rank)
    return [make_stage(config.model, config.precision, padded_vocab_size, stream, stage, mesh.ends, mask_id)
            for stage in stages]


def with_optimizer(config: Config, mesh: Mesh, padded_vocab_size: int, stages: list[ProteinModel],
                   model: DataParallel, peak_lr: float | None = None) -> Engine:
    """The engine of `stages` that `model` wraps already, with pipeline, optimizer and all else that it needs."""
    num_tokens = stages[0].stream.num_tokens_here(config.training.micro_batch_size * config.data.seq_length)
    pipeline = Pipeline(mesh, len(stages), config.parallel.pipeline_schedule,
                        lambda stage, is_output: stages[stage].message(num_tokens, mesh.device, is_output))
    matrices = (layer for stage in stages if not model.is_gathered for layer in stage.matrices())
    copies = ComputeCopies(matrices, compute_dtype(config.precision))
    amaxes = AmaxHistory(stages, mesh)
    optimizer = Optimizer(model.parameters, config.optimizer, mesh, config.schedule.lr if peak_lr is None else peak_lr,
                          config.training.cuda_graph, config.schedule.weight_decay_incr_style != "constant")
    decay = config.optimizer.ema
    average = None if decay is None else WeightAverage(model.parameters, decay, mesh.device)
    loss_scale = LossScale(config.precision, mesh.device)
    return Engine(config, mesh, padded_vocab_size, stages, model, pipeline, optimizer, average, copies, amaxes,
                  loss_scale, wants_compilation(config, mesh.device))
