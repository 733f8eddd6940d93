"""The step as CUDA graphs: captured once, then launched again, so that the host does not hold up a small model.

Two graphs, one of a micro-batch, forward and backward, and one of the update. All micro-batches have one shape, and
what differs from one to the next, dropout's seed and the learning rate among it, lies on the device at fixed places.
Between the two the data-parallel ranks sum their gradients, outside of graphs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.config import Config
from megatron.data.batches.batch import Batch
from megatron.errors import ConfigError
from megatron.optim.optimizer import StepOutcome
from megatron.parallel.mesh import Mesh
from megatron.train.step.engine import Engine

_WARM_UP = 2  # calls that run as they are: they compile, and make gradients, moments and libraries' workspaces


class CudaRecorder:
    """Runs functions so that they can be recorded, and records them, as CUDA graphs.

    All on one stream, since what autograd did on another would wait for that.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `function` gives; on the stream, between what was queued before and what comes."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """What does again what `function` did, in the same memory, and the tensors that it fills, yet to be computed.
        """
        graph = torch.cuda.CUDAGraph()
        # What the loader's thread pins meanwhile is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


class _Recorded:
    """A function of tensors at fixed places: run at first, recorded then, done again from there on."""

    def __init__(self, function: Callable[[], list[Tensor]], recorder: CudaRecorder) -> None:
        self._function, self._recorder, self._num_calls = function, recorder, 0
        self._recording: tuple[Callable[[], None], list[Tensor]] | None = None

    def __call__(self) -> list[Tensor]:
        """The outputs; the next call overwrites them."""
        self._num_calls += 1
        if self._num_calls <= _WARM_UP:
            return self._recorder.run(self._function)
        if self._recording is None:
            self._recording = self._recorder.record(self._function)
        replay, outputs = self._recording
        replay()
        return outputs


class StepGraph:
    """What `TrainStep` does with an engine's micro-batches and optimizer, by graphs."""

    def __init__(self, engine: Engine, recorder: CudaRecorder) -> None:
        self._engine, self._recorder = engine, recorder
        # fp32: a fault that is made on purpose is a factor on it.
        self._num_targets = torch.ones((), device=engine.mesh.device)
        # By their shapes: of which there are several where a micro-batch has more proteins than was foreseen.
        self._micro_batches: dict[tuple[torch.Size, ...], tuple[Batch, _Recorded]] = {}
        self._update = _Recorded(self._updated, recorder)

    def set_targets(self, num_targets: Tensor | float) -> None:
        """Of the whole global batch, by which losses are divided."""
        if isinstance(num_targets, Tensor):
            self._num_targets.copy_(num_targets)
        else:
            self._num_targets.fill_(num_targets)

    def micro_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The share of the global batch's mean loss, and how many targets are predicted right; gradients are added."""
        tensors = *batch.sequence.tensors(), *batch.targets.tensors()
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._micro_batches:
            fixed = batch.to(self._engine.mesh.device)
            self._micro_batches[shapes] = fixed, _Recorded(lambda: self._passed(fixed), self._recorder)
        fixed, passes = self._micro_batches[shapes]
        for place, tensor in zip((*fixed.sequence.tensors(), *fixed.targets.tensors()), tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        # A step that is scaled by itself is another one than those to come.
        run = passes if self._engine.amaxes.is_known else lambda: self._recorder.run(lambda: self._passed(fixed))
        loss_share, num_correct = run()
        return loss_share, num_correct

    def update(self, learning_rate: float) -> StepOutcome:
        """The optimizer's step."""
        self._engine.optimizer.set_learning_rate(learning_rate)
        grad_norm, is_taken = self._update()
        return StepOutcome(grad_norm.clone(), is_taken.clone())

    def _passed(self, batch: Batch) -> list[Tensor]:
        engine = self._engine
        loss_sum, num_correct = engine.model.forward(0, batch.sequence, batch.targets, None)
        loss_share = loss_sum / self._num_targets
        engine.model.before_backward(0, True)
        (loss_share * engine.loss_scale.value).backward()
        return [loss_share.detach(), num_correct]

    def _updated(self) -> list[Tensor]:
        outcome = self._engine.update(None)
        return [outcome.grad_norm, outcome.is_taken]


def check_graph(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the step that `config` asks for cannot be a graph."""
    if not config.training.cuda_graph:
        return
    parallel, flag = config.parallel, "--cuda-graph"
    if mesh.device.type != "cuda":
        raise ConfigError(f"{flag} needs a GPU, and this run is on {mesh.device.type}; leave it out")
    reasons = {
        "whose stages wait for messages: --pipeline-model-parallel-size": (mesh.pipeline.size, 1),
        "whose gathers a graph would hold on to: --data-parallel-sharding": (parallel.data_parallel_sharding, "none"),
        "whose sums start from hooks: --DDP-impl": (parallel.DDP_impl, "local"),
        "whose optimizer asks the host: --optimizer-backend": (config.optimizer.optimizer_backend, "torch"),
        "whose matrices are stepped whole, in rounds that ranks share: --optimizer": (
            config.optimizer.optimizer, "adam" if config.optimizer.uses_muon else config.optimizer.optimizer)}
    for why, (value, wanted) in reasons.items():
        if value != wanted:
            raise ConfigError(f"{flag} cannot capture a run {why} {value}; leave it out, or give {wanted} there")
