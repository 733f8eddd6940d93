"""The other Triton kernels without a GPU: interpreted on CPU tensors, and compiled for GPUs that are not present.

Each in its own process, because Triton decides when it is loaded whether it interprets. The checks are in
`tests/interpreted.py`.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config.reading.presets import PRESETS
from megatron.kernels.device import takes_triton
from tests.interpreted import CHECKS
from tests.tables import tried

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)  # a process of a minute's work, on a computer that may do other work
ROOT = Path(__file__).resolve().parents[2]
EACH_TIME, GENERATIONS = 90, (80, 90, 100)
CHECKED_EACH_TIME = {*list(CHECKS)[5::8]}
# What no preset has: flags, and tokens.
RECIPE = "--normalization RMSNorm --swiglu --qk-layernorm --rotary-percent 0.5 --qkv-conv-kernel 5".split()
OTHERS = [(["--preset", "esm2-650m", *RECIPE], 1024), (["--preset", "esm2-8m", *RECIPE], 1),
          (["--preset", "tape", "--fp16", "--qk-layernorm", "--squared-relu", "--fp32-residual-connection"], 1000)]
# What a block launches besides matrix products and attention, forward and backward.
MOST_LAUNCHES = {"esm2-650m": 16, "tape": 13, "recipe-150m": 19}
MOST_LAUNCHES_OF_LOSS = 18  # with PyTorch's own cross entropy there were 22
MOST_SPILLED = 24  # bytes a thread, of kernels that wait for memory

_COMPILE = """
import json, sys
from benchmarks.compiled import distinct
from benchmarks.launched import launches_of_block, launches_of_loss
from megatron.config.command_line import parse

presets, capability, others = map(json.loads, sys.argv[1:])
passes = {preset: launches_of_block(parse(["--preset", preset])[0]) for preset in presets}
losses = {preset: launches_of_loss(parse(["--preset", preset])[0]) for preset in presets}
of_presets, of_others = (list(distinct([launch for both in all_passes for each in both for launch in each.triton]))
                         for all_passes in ([*passes.values(), *losses.values()],
                                            [*(launches_of_block(parse(flags)[0], num_tokens)
                                               for flags, num_tokens in others),
                                             *(launches_of_loss(parse(flags)[0], 30.0) for flags, _ in others[:1])]))
wanted = of_presets + [launch for launch in of_others if capability == 90 or launch.name.startswith("convolution")]
found = [(launch.name, launch.resources(capability).spilled) for launch in wanted]
counts = [{preset: sum(each.num_pointwise for each in both) for preset, both in of.items()} for of in (passes, losses)]
print(json.dumps([found, *counts]))
"""


def answer(*command: str, interprets: bool, **environment: str) -> Any:
    """What a process of its own prints, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("TRITON_INTERPRET", None)
    if interprets:
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@cache
def wrong(is_each_time: bool) -> dict[str, str]:
    """What is wrong in the checks that are made each time, or in the others: each a process's work."""
    names = [name for name in CHECKS if (name in CHECKED_EACH_TIME) == is_each_time]
    return answer("-m", "tests.interpreted", *names, interprets=True)


def compiled_for(capability, folder, presets, others=()):
    """The name and the spilled bytes of each kernel, the launches of a block and those of the loss, by preset."""
    return answer("-c", _COMPILE, json.dumps(list(presets)), json.dumps(capability), json.dumps(others),
                  interprets=False, TRITON_CACHE_DIR=str(folder))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_for(EACH_TIME, tmp_path_factory.mktemp("compiled"), MOST_LAUNCHES)


@pytest.mark.parametrize("check", tried(CHECKS, CHECKED_EACH_TIME))
def test_interpreted_it_is_what_plain_pytorch_gives(check):
    found = wrong(check in CHECKED_EACH_TIME)[check]
    assert not found, found


def check_kernels(found):
    operations = "residual_norm", "activation", "heads", "convolution", "cross_entropy"
    assert {name for name, _ in found} == {f"{operation} {direction}_kernel" for operation in operations
                                           for direction in ("forward", "backward")} | {"heads turn_back_kernel"}
    assert [kernel for kernel in found if kernel[1] > MOST_SPILLED] == []
    assert sum(kernel[1] > 0 for kernel in found) <= 0.05 * len(found)


def test_every_kernel_of_these_presets_compiles_and_hardly_spills(compiled):
    check_kernels(compiled[0])


def test_heads_of_any_width_and_part_that_is_turned_are_taken_by_a_power_of_two_of_warps(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.compiled import Launches
    from megatron.kernels.pointwise.heads import prepared_heads
    from megatron.kernels.rotary import Rotation

    with torch.device("meta"), Launches() as launches:
        for width in (16, 24, 48, 64, 72, 80, 96, 128):
            for half in range(2, width // 2 + 1, 2):
                rotation = Rotation(torch.empty(8, 1, 1, half), torch.empty(8, 1, 1, half))
                heads, = prepared_heads(torch.empty(8, 16, 3, width, requires_grad=True), None, rotation)
                heads.backward(torch.empty_like(heads))
    assert {launch.options["num_warps"] for launch in launches.triton} <= {1, 2, 4}


@pytest.mark.table
@pytest.mark.parametrize("capability", GENERATIONS)
def test_every_kernel_of_every_preset_compiles_for_every_generation_of_gpus(tmp_path, capability):
    kernels, _, of_losses = compiled_for(capability, tmp_path, PRESETS, OTHERS)
    check_kernels(kernels)
    assert max(of_losses.values()) <= MOST_LAUNCHES_OF_LOSS


@pytest.mark.parametrize("preset", MOST_LAUNCHES)
def test_a_block_launches_few_kernels_besides_its_products(compiled, preset):
    assert compiled[1][preset] <= MOST_LAUNCHES[preset]


def test_head_and_loss_launch_few_kernels_besides_their_products_whatever_the_micro_batch(compiled):
    assert max(compiled[2].values()) <= MOST_LAUNCHES_OF_LOSS


def test_cpus_and_what_is_compiled_go_the_plain_way_and_fake_tensors_a_gpus(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not takes_triton(torch.empty(2))
    assert takes_triton(torch.empty(2, device="meta")) and not takes_triton(torch.empty(2, device="meta").double())
    with FakeTensorMode():
        assert takes_triton(torch.empty(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes_triton(torch.empty(2, device="meta"))
