"""The step as CUDA graphs: captured once, then replayed, so that a small model does not wait for kernel launches.

There are two graphs: forward and backward of one micro-batch, and the update. All micro-batches have one shape, and
whatever varies (tokens, dropout's seed, the learning rate) is copied to fixed addresses on the device. Between the two
graphs the data-parallel ranks sum their gradients, outside of any graph.
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

_WARM_UP = 2  # calls before the capture: they compile, and allocate gradients, moments and libraries' workspaces


class CudaRecorder:
    """Runs functions, and captures them as CUDA graphs, all on one stream.

    A captured backward pass would otherwise wait for the stream on which autograd ran before.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run `function` on this stream, in order with what the current stream does before and after; its outputs."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """Capture `function` without running it: a function that replays it in the same memory, and its output tensors,
        which the first replay computes."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the loader's thread may pin memory during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


class _Recorded:
    """A function whose inputs stay at fixed addresses: its first calls run it, the next captures it, later ones replay.
    """

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
    """Runs an engine's micro-batches and its update for `TrainStep`, as CUDA graphs."""

    def __init__(self, engine: Engine, recorder: CudaRecorder) -> None:
        self._engine, self._recorder = engine, recorder
        # fp32, not an integer: injected faults multiply it by a factor.
        self._num_targets = torch.ones((), device=engine.mesh.device)
        # A graph for each combination of shapes: there is a second one if a micro-batch has unusually many proteins.
        self._micro_batches: dict[tuple[torch.Size, ...], tuple[Batch, _Recorded]] = {}
        self._update = _Recorded(self._updated, recorder)

    def set_targets(self, num_targets: Tensor | float) -> None:
        """Set the number of targets of the whole global batch, by which losses are divided."""
        if isinstance(num_targets, Tensor):
            self._num_targets.copy_(num_targets)
        else:
            self._num_targets.fill_(num_targets)

    def micro_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: its share of the global mean loss, and its correct predictions.

        The gradients are accumulated.
        """
        tensors = *batch.sequence.tensors(), *batch.targets.tensors()
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._micro_batches:
            fixed = batch.to(self._engine.mesh.device)
            self._micro_batches[shapes] = fixed, _Recorded(lambda: self._passed(fixed), self._recorder)
        fixed, passes = self._micro_batches[shapes]
        for place, tensor in zip((*fixed.sequence.tensors(), *fixed.targets.tensors()), tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        # The first FP8 step has no history, takes its scales from itself, and so is not the graph of later steps.
        run = passes if self._engine.amaxes.is_known else lambda: self._recorder.run(lambda: self._passed(fixed))
        loss_share, num_correct = run()
        return loss_share, num_correct

    def update(self, learning_rate: float) -> StepOutcome:
        """The update, as `Engine.update` does it."""
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
    """Raises ConfigError if `--cuda-graph` is given and the step cannot be captured."""
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
