"""A training step never waits for the device; tested on an accelerator that does not exist.

torch lets Python register a device. Its tensors are fake here (FakeTensorMode): nothing is computed, but every
operation is dispatched and can be inspected.
"""

import sys
from datetime import timedelta
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.command_line import parse
from megatron.data.batches.batch import BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.parallel.data.data_parallel import data_parallel
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.train.step.engine import build_stages, with_optimizer
from megatron.train.step.meters import Meters
from megatron.train.step.spikes import SpikeJudge
from megatron.train.step.train_step import TrainStep
from tests.ranks.launch import warm_processes
from tests.tables import tried

FLAGS = ("--preset tape --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 96 "
         "--max-position-embeddings 96 --micro-batch-size 2 --train-iters 9").split()
LAYOUTS = {"one rank": (1, ""), "one rank, fp16": (1, "--fp16"), "one rank, fp32": (1, "--no-bf16"),
           "recomputed": (1, "--checkpoint-activations --attention-dropout 0 --hidden-dropout 0"),
           "normuon": (1, "--optimizer normuon --cautious-weight-decay"),
           "skip": (2, "--pipeline-model-parallel-size 2 --global-batch-size 4 --on-spike skip"),
           "average": (1, "--ema 0.999 --cautious-weight-decay"),
           "data": (2, "--global-batch-size 8"),
           "tensor": (2, "--tensor-model-parallel-size 2"),
           "sequence": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
           "convolution": (1, "--qkv-conv-kernel 5"),
           "rotary": (1, "--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0"),
           "recipe": (1, "--position-embedding-type rope --normalization RMSNorm --qk-layernorm --swiglu "
                         "--disable-bias-linear --group-query-attention --num-query-groups 2 --window-size 9 9 "
                         "--untie-embeddings-and-output-weights --value-embeddings --unet-skips --x0-skips "
                         "--attention-dropout 0 --hidden-dropout 0 --optimizer muon"),
           "context": (2, "--context-parallel-size 2 --qkv-conv-kernel 5"),
           "fp8": (1, "--fp8 hybrid"),
           "fp8 delayed": (1, "--fp8 hybrid --fp8-recipe delayed"),
           "fp8 recomputed": (1, "--fp8 hybrid --fp8-recipe mxfp8 --checkpoint-activations"),
           "fp8 sequence": (2, "--fp8 hybrid --fp8-recipe rowwise --tensor-model-parallel-size 2 --sequence-parallel"),
           "pipeline": (2, "--pipeline-model-parallel-size 2 --global-batch-size 4")}
# What these have is in another layout, too.
OTHERS = ("one rank, fp32", "convolution", "rotary", "fp8", "fp8 recomputed", "pipeline")
EACH_TIME = [layout for layout in LAYOUTS if layout not in OTHERS]
# Operations whose result the host must know, or whose shape depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "item")


class Watch(TorchDispatchMode):
    """Collects in `waits` the operations for which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.num_seen = 0
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        self.num_seen += 1
        if "_pin_memory" in name:
            return self._pin(torch.empty(args[0].shape, dtype=args[0].dtype))
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        if any(word in name for word in WAITING) and any(tensor.device.type == "toy" for tensor in tensors):
            self.waits.append(name)
        if "_local_scalar_dense" in name and tensors[0].device.type == "cpu":
            return 1  # the host may look at its own; a fake tensor has no value
        if "_to_copy" in name:
            self._check_copy(name, args[0], kwargs.get("device") or args[0].device, bool(kwargs.get("non_blocking")))
        elif "copy_" in name:
            targets, sources = (part if isinstance(part, (list, tuple)) else [part] for part in args[:2])
            for target, source in zip(targets, sources, strict=True):
                self._check_copy(name, source, target.device, bool(kwargs.get("non_blocking") or args[2:] == (True,)))
        return func(*args, **kwargs)

    def _check_copy(self, name: str, source: Tensor, target: torch.device, is_asynchronous: bool) -> None:
        kinds = source.device.type, target.type
        if kinds == ("cpu", "toy") and not (is_asynchronous and any(source is tensor for tensor in self._pinned)):
            self.waits.append(f"{name} from unpinned memory {tuple(source.shape)}")
        if kinds == ("toy", "cpu") and not is_asynchronous:
            self.waits.append(f"{name} to the host {tuple(source.shape)}")

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor)
        return tensor


def batch(share: int, num_shares: int) -> Any:
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 31, 90)
    row = Row(tokens, np.array([40, 30, 20]), np.arange(1, 90, 7), tokens[1::7])
    return collate([row, row], BatchShape(192, 12, 26, 40, share, num_shares))


def watched_steps(runs: list[tuple[int, list[str], bool]]) -> list[tuple[list[str], int]]:
    """For a number of ranks, flags and whether it is disturbed: what a step would wait for, and its operations."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("toy")
    torch.get_device_module("toy").get_amp_supported_dtype = list  # torch.utils.checkpoint asks
    return [watched_step(*run) for run in runs]


def watched_step(ranks: int, flags: list[str], disturb: bool) -> tuple[list[str], int]:
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("toy", 0)
    config, _ = parse([*FLAGS, *flags])
    mesh = Mesh(device=device)
    if ranks > 1:
        dist.init_process_group("cpu:fake,toy:fake", store=dist.HashStore(), rank=0, world_size=ranks)
        mesh = build_mesh(config.parallel, device, timedelta(minutes=1))
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device, patch.object(torch, "tensor", _without_values):
            stages = build_stages(config, mesh, 128)
            model = data_parallel(stages, ProteinModel.blocks, mesh, config.parallel, compute_dtype(config.precision))
            engine = with_optimizer(config, mesh, 128, stages, model)
        judge = SpikeJudge(config.guards, device, False) if config.guards.on_spike == "skip" else None
        step = TrainStep(engine, Meters(mesh.world, device), judge=judge)
        num_micro_batches = max(1, (config.training.global_batch_size or 0) // (2 * mesh.data.size))
        with watch:
            batches = [batch(mesh.context.rank, mesh.context.size).pin_memory() for _ in range(num_micro_batches)]
            for _ in range(2):
                step(batches, 1e-4, (False, False))
            if disturb:
                engine.loss_scale.value.cpu()
    if ranks > 1:
        dist.destroy_process_group()
    return watch.waits, watch.num_seen


_tensor = torch.tensor


def _without_values(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
    """Stands for `torch.tensor`, which fills a device's memory where no mode sees it: in a step that ends the test."""
    values = _tensor(*arguments, **{**options, "device": "cpu"})
    return torch.empty(values.shape, dtype=values.dtype, device=device or "cpu")


def _answer(connection: Any, runs: list[tuple[int, list[str], bool]]) -> None:
    try:
        connection.send(watched_steps(runs))
    except BaseException as error:
        connection.send(repr(error))
        raise
    sys.exit(0)


@cache
def found(*layouts: str) -> dict[str, tuple[list[str], int]]:
    """What each layout would wait for, from a process of its own: the device's name stays registered in it."""
    runs = [(ranks, flags.split(), False) for ranks, flags in map(LAYOUTS.__getitem__, layouts)]
    context = warm_processes()
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, [*runs, (1, [], True)]))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    assert not isinstance(answer, str), answer
    return dict(zip([*layouts, "disturbed"], answer, strict=True))


@pytest.mark.parametrize("layout", tried(LAYOUTS, EACH_TIME))
def test_a_step_waits_for_nothing(layout):
    waits, num_seen = found(*(OTHERS if layout in OTHERS else EACH_TIME))[layout]
    assert num_seen > 100
    assert waits == []


def test_a_copy_to_the_host_would_be_seen():
    assert found(*EACH_TIME)["disturbed"][0] == ["aten._to_copy.default to the host ()"]
