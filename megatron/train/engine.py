"""The model in its layout, with what runs and steps it: everything of a run but its data, its log and its progress."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.config import Config
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.data.data_parallel import DataParallel, data_parallel
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline.partition import stages_of_rank
from megatron.parallel.pipeline.run import Pipeline
from megatron.parallel.tensor.stream import Stream


@dataclass(frozen=True)
class Engine:
    """`stages`: the model's on this pipeline rank; `model`: the same, as data parallelism runs and shares them out."""

    config: Config
    mesh: Mesh
    padded_vocab_size: int
    stages: list[ProteinModel]
    model: DataParallel
    pipeline: Pipeline
    optimizer: Optimizer
    loss_scale: LossScale


def build_engine(config: Config, mesh: Mesh, padded_vocab_size: int,
                 load: Callable[[list[ProteinModel]], None] | None = None) -> Engine:
    """This rank's part of the engine, on the mesh's device; `load` fills the stages, else the seed does."""
    stages = build_stages(config, mesh, padded_vocab_size)
    if load is not None:
        load(stages)
    else:
        for stage in stages:
            initialise(stage, config.training.seed)
    model = data_parallel(stages, ProteinModel.blocks, mesh, config.parallel)
    return with_optimizer(config, mesh, padded_vocab_size, stages, model)


def build_stages(config: Config, mesh: Mesh, padded_vocab_size: int) -> list[ProteinModel]:
    """The model's stages on this pipeline rank, this rank's part of each, without values."""
    stream = Stream(mesh.tensor, config.parallel.sequence_parallel, mesh.context)
    stages = stages_of_rank(config.model.num_layers, config.parallel, mesh.pipeline.rank)
    return [ProteinModel(config.model, config.precision, padded_vocab_size, stream, stage, mesh.ends)
            for stage in stages]


def with_optimizer(config: Config, mesh: Mesh, padded_vocab_size: int, stages: list[ProteinModel],
                   model: DataParallel) -> Engine:
    """The engine of stages that data parallelism has shared out."""
    pipeline = Pipeline(mesh, len(stages), config.parallel.pipeline_schedule)
    optimizer = Optimizer(model.parameters, config.optimizer, mesh.pipeline)
    loss_scale = LossScale(config.precision, mesh.device)
    return Engine(config, mesh, padded_vocab_size, stages, model, pipeline, optimizer, loss_scale)
