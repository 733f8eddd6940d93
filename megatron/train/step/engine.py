"""The model in its layout, with what runs and steps it: everything of a run but its data, its log and its progress."""

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
    """`stages`: the model's on this pipeline rank; `model`: the same, as data parallelism runs and shares them out.

    `average`: that of the weights, where --ema asks for one.
    """

    config: Config
    mesh: Mesh
    padded_vocab_size: int
    stages: list[ProteinModel]
    model: DataParallel
    pipeline: Pipeline
    optimizer: Optimizer
    average: WeightAverage | None
    copies: ComputeCopies
    amaxes: AmaxHistory
    loss_scale: LossScale
    is_compiled: bool

    @property
    def skips_filler(self) -> bool:
        """Whether micro-batches may do without it: where nothing counts on their one shape, and on CPUs alone.

        There is no launch or graph to save there, and rows of a small corpus may be mostly filler. In FP8 scales that
        tokens share, and blocks of them, are to be those of every other layout.
        """
        mesh = self.mesh
        is_free = not self.is_compiled and self.config.precision.fp8 is None
        return mesh.device.type == "cpu" and mesh.pipeline.size == mesh.context.size == 1 and is_free

    def update(self, learning_rate: float | None, is_normal: Callable[[Tensor], Tensor] | None = None) -> StepOutcome:
        """Step along the gradients, and bring all up to date; the arguments as `Optimizer.step` has them."""
        outcome = self.optimizer.step(learning_rate, self.loss_scale, is_normal)
        if self.average is not None:
            self.average.update(outcome.is_taken)
        self.copies.refresh()
        return outcome

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model computes with the average of the weights; all ranks enter and leave together."""
        assert self.average is not None
        try:
            with self.average.in_place():
                self.take_up_weights()
                yield
        finally:
            self.take_up_weights()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the model is in evaluation: nothing is dropped out."""
        try:
            for stage in self.stages:
                stage.eval()
            yield
        finally:
            for stage in self.stages:
                stage.train()

    def take_up_weights(self) -> None:
        """Compute with what the parameters have been given since the last update."""
        self.model.drop_gathered()
        self.copies.refresh()


Fill = Callable[[Mapping[str, nn.Parameter]], None]
MakeStage = Callable[..., ProteinModel]


def build_engine(config: Config, mesh: Mesh, padded_vocab_size: int, fill: Fill | None = None,
                 is_frozen: Callable[[str], bool] = lambda name: False, mask_id: int | None = None,
                 make_stage: MakeStage = ProteinModel) -> Engine:
    """This rank's part of the engine, on the mesh's device; `fill` gives the parameters their values, else the seed.

    Before that nothing has any: no rank holds more than its own part, and of what it fills it with one tensor.
    `is_frozen` says of a parameter's name whether it is not trained; `mask_id` is that of [MASK]; `make_stage` takes
    what ProteinModel takes.
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
    return with_optimizer(config, mesh, padded_vocab_size, stages, model)


def stream_of(config: Config, mesh: Mesh) -> Stream:
    """Where the tokens of the residual stream lie in the layout."""
    return Stream(mesh.tensor, config.parallel.sequence_parallel, mesh.context)


def build_stages(config: Config, mesh: Mesh, padded_vocab_size: int, mask_id: int | None = None,
                 make_stage: MakeStage = ProteinModel) -> list[ProteinModel]:
    """The model's stages on this pipeline rank, this rank's part of each, without values."""
    stream = stream_of(config, mesh)
    stages = stages_of_rank(config.model.num_layers, config.parallel, mesh.pipeline.rank)
    return [make_stage(config.model, config.precision, padded_vocab_size, stream, stage, mesh.ends, mask_id)
            for stage in stages]


def with_optimizer(config: Config, mesh: Mesh, padded_vocab_size: int, stages: list[ProteinModel],
                   model: DataParallel) -> Engine:
    """The engine of stages that data parallelism has shared out."""
    num_tokens = stages[0].stream.num_tokens_here(config.training.micro_batch_size * config.data.seq_length)
    pipeline = Pipeline(mesh, len(stages), config.parallel.pipeline_schedule,
                        lambda stage, is_output: stages[stage].message(num_tokens, mesh.device, is_output))
    matrices = (layer for stage in stages if not model.is_gathered for layer in stage.matrices())
    copies = ComputeCopies(matrices, compute_dtype(config.precision))
    amaxes = AmaxHistory(stages, mesh)
    optimizer = Optimizer(model.parameters, config.optimizer, mesh, config.schedule.lr, config.training.cuda_graph,
                          config.schedule.weight_decay_incr_style != "constant")
    decay = config.optimizer.ema
    average = None if decay is None else WeightAverage(model.parameters, decay, mesh.device)
    loss_scale = LossScale(config.precision, mesh.device)
    return Engine(config, mesh, padded_vocab_size, stages, model, pipeline, optimizer, average, copies, amaxes,
                  loss_scale, wants_compilation(config, mesh.device))
