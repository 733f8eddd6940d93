"""Data parallelism, each kind of it, agrees with one rank that sees the whole batch."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch

from megatron.config import ParallelConfig
from megatron.parallel.data.data_parallel import data_parallel
from megatron.parallel.data.replicated import DataParallel
from megatron.parallel.mesh import Axis, Mesh, build_mesh
from megatron.parallel.parameters import Normal
from megatron.parallel.placement import gradient_norm
from megatron.parallel.tensor.layers import ColumnParallelLinear
from megatron.parallel.tensor.stream import ONE_RANK_STREAM
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.wholes import wholes

WAYS: dict[str, dict[str, Any]] = {
    "local": {}, "torch": {"DDP_impl": "torch"}, "optimizer": {"data_parallel_sharding": "optimizer"},
    "gradients": {"data_parallel_sharding": "gradients"}, "parameters": {"data_parallel_sharding": "parameters"}}
ROWS = 12


def make_model(widths: tuple[int, int] = (7, 3)) -> torch.nn.Sequential:
    """Layers whose rows do not divide evenly by the ranks, one of them fewer than ranks."""
    torch.manual_seed(0)
    wide, narrow = widths
    return torch.nn.Sequential(torch.nn.Linear(5, wide), torch.nn.GELU(), torch.nn.Linear(wide, narrow),
                               torch.nn.Linear(narrow, 1))


def gradients_of_a_step(parallel: DataParallel, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Gradients' wholes, and their norm, after a step over this rank's micro-batches."""
    rows = torch.randn(ROWS, 6, 5, generator=torch.Generator().manual_seed(1))
    mine = list(range(mesh.replicas.rank, ROWS, mesh.replicas.size))
    for index in mine:
        loss = parallel.forward(0, rows[index]).square().sum()
        parallel.before_backward(0, is_last=index == mine[-1])
        loss.backward()
    parallel.reduce_gradients()
    gradients = {name: parameter.grad for name, parameter in parallel.parameters.items() if parameter.grad is not None}
    return {**wholes(gradients, parallel.parameters), "norm": gradient_norm(parallel.parameters.values())}


def gradients_of_two_steps(mesh: Mesh, config: ParallelConfig, lr: float = 1e-3,
                           widths: tuple[int, int] = (7, 3)) -> list[dict[str, torch.Tensor]]:
    """What `gradients_of_a_step` gives before and after an SGD step, and the output after another."""
    parallel = data_parallel([make_model(widths)], lambda stage: [stage[0], stage[2]], mesh, config, torch.float32)
    steps = []
    for _ in range(2):
        steps.append(gradients_of_a_step(parallel, mesh))
        torch.optim.SGD(parallel.parameters.values(), lr=lr).step()
        for parameter in parallel.parameters.values():
            parameter.grad = None
    with torch.no_grad():  # what the layers compute with is what the optimizer stepped
        steps.append({"output": parallel.forward(0, torch.ones(6, 5))})
    return steps


def is_freed(mesh: Mesh, config: ParallelConfig) -> bool:
    """Whether nothing keeps a model that was trained and is needed no more."""
    model = make_model()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    parallel = data_parallel([model], lambda stage: [], mesh, config, torch.float32)
    weights += map(weakref.ref, parallel.parameters.values())
    parallel.before_backward(0, is_last=True)
    parallel.forward(0, torch.ones(2, 5)).sum().backward()
    parallel.reduce_gradients()
    del model, parallel
    gc.collect()
    return not any(weight() is not None for weight in weights)


def each_way(axis: Axis, within: Any) -> dict[str, dict[str, Any]]:
    """For each way the steps' outcomes, and how many elements of parameters this rank holds."""
    outcomes = {}
    for name, flags in WAYS.items():
        config = ParallelConfig(**flags, **({"shard_within": within} if "data_parallel_sharding" in flags else {}))
        mesh = build_mesh(config, torch.device("cpu"), TIMEOUT)
        held = data_parallel([make_model()], lambda stage: [], mesh, config, torch.float32).parameters
        outcomes[name] = {"is_freed": is_freed(mesh, config), "steps": gradients_of_two_steps(mesh, config),
                          "held": sum(parameter.numel() for parameter in held.values())}
    return outcomes


def gradients_of_bf16(axis: Axis) -> dict[str, torch.Tensor]:
    """For each sharding the whole gradient of a weight whose products are 1 on rank 0 and 2^-12 on rank 1."""
    found = {}
    for sharding in ("optimizer", "gradients", "parameters"):
        config = ParallelConfig(data_parallel_sharding=sharding)
        mesh = build_mesh(config, torch.device("cpu"), TIMEOUT)
        parallel = data_parallel([torch.nn.Linear(4, 1, bias=False)], lambda stage: [], mesh, config, torch.bfloat16)
        parallel.before_backward(0, is_last=True)
        parallel.forward(0, torch.full((1, 4), (1, 2**-12)[axis.rank], dtype=torch.bfloat16)).sum().backward()
        parallel.reduce_gradients()
        gradients = {name: weight.grad for name, weight in parallel.parameters.items() if weight.grad is not None}
        found[sharding], = wholes(gradients, parallel.parameters).values()
    return found


def sums_of_small_and_large(axis: Axis) -> dict[str, torch.Tensor]:
    """For each sharding the whole gradient of a weight whose products are 1 in the first micro-batch, then 2^-12 twice.
    """
    found = {}
    for sharding in ("optimizer", "gradients", "parameters"):
        config = ParallelConfig(data_parallel_sharding=sharding)
        mesh = build_mesh(config, torch.device("cpu"), TIMEOUT)
        layer = ColumnParallelLinear(4, 2, ONE_RANK_STREAM, Normal(1.0), has_bias=False)
        parallel = data_parallel([layer], lambda stage: [], mesh, config, torch.bfloat16)
        for number, value in enumerate((1, 2**-12, 2**-12)):
            output = parallel.forward(0, torch.full((1, 4), value, dtype=torch.bfloat16, requires_grad=True))
            parallel.before_backward(0, is_last=number == 2)
            output.sum().backward()
        parallel.reduce_gradients()
        gradients = {name: weight.grad for name, weight in parallel.parameters.items() if weight.grad is not None}
        found[sharding], = wholes(gradients, parallel.parameters).values()
    return found


def steps_from_the_same_weights(axis: Axis) -> dict[str, list[dict[str, torch.Tensor]]]:
    """For each way the gradients of a first and a second step that start from the same weights.

    The model's size is that at which torch's reducer, left to itself, forms other buckets after the first step.
    """
    configs = {name: ParallelConfig(**flags) for name, flags in WAYS.items()}
    return {name: gradients_of_two_steps(build_mesh(config, torch.device("cpu"), TIMEOUT), config, lr=0.0,
                                         widths=(700, 601))[:2]
            for name, config in configs.items()}


@pytest.fixture(scope="module", params=[(2, None), (4, None), (4, 2)], ids=["2 ranks", "4 ranks", "4 in pairs"])
def results(request):
    ranks, within = request.param
    return within or ranks, run_ranks(each_way, ranks, within)


def test_gradients_are_the_sums_that_one_rank_gets(results):
    expected = gradients_of_two_steps(Mesh(), ParallelConfig())
    for outcomes, way in itertools.product(results[1], WAYS):
        for ours, one in zip(outcomes[way]["steps"], expected, strict=True):
            assert ours.keys() == one.keys()
            for name in one:
                torch.testing.assert_close(ours[name], one[name], rtol=1e-5, atol=1e-5, msg=f"{way}, {name}")


def test_shards_sum_gradients_in_fp32_whatever_they_compute_in():
    for found in run_ranks(gradients_of_bf16, 2):
        assert all(torch.equal(gradient, torch.full((1, 4), 1 + 2**-12)) for gradient in found.values())


def test_shards_sum_micro_batches_in_fp32_whatever_they_compute_in():
    for found in run_ranks(sums_of_small_and_large, 2):
        assert all(torch.equal(gradient, torch.full((2, 4), 2 + 4 * 2**-12)) for gradient in found.values())


def test_a_model_that_is_needed_no_more_is_freed(results):
    assert all(outcomes[way]["is_freed"] for outcomes in results[1] for way in WAYS)


def test_shares_of_the_ranks_are_together_the_whole(results):
    num_shares, outcomes = results
    num_parameters = sum(parameter.numel() for parameter in make_model().parameters())
    for way in WAYS:
        total = sum(rank[way]["held"] for rank in outcomes)
        copies = len(outcomes) if way in ("local", "torch") else len(outcomes) // num_shares
        assert total == copies * num_parameters


def test_no_bit_of_a_sum_depends_on_how_many_steps_the_process_took_before():
    """What lets a resumed run repeat the unbroken one. With three ranks a sum's order depends on its place in a bucket.
    """
    for outcomes, way in itertools.product(run_ranks(steps_from_the_same_weights, 3), WAYS):
        first, second = outcomes[way]
        assert all(torch.equal(first[name], second[name]) for name in first), way
