"""The Triton attention without a GPU: interpreted against the definition in fp64, and compiled for three kinds of GPU.

Interpreted kernels need their own process: `tests/interpreted_attention.py`. Interpretation tests neither bf16, whose
products Triton's interpreter gets wrong, nor speed.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron.config.reading.presets import PRESETS
from megatron.errors import ConfigError
from megatron.kernels.attention import backends, by_protein
from megatron.kernels.attention.backends import choose
from megatron.kernels.attention.packed import packed_attention
from tests.interpreted_attention import CASES, UNSEEN
from tests.packed import packed_batch
from tests.tables import tried

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


EACH_TIME = ("small heads", "groups of three queries", "fp16", "proteins of one token", "no filler", "filler alone",
             "dropout in a window", "four ranks, one of them filler", "other proteins")
OTHERS = (*(name for name in [*CASES, *UNSEEN] if name not in EACH_TIME), "titin")


@cache
def interpreted(*checks):
    """What each of them found, in a process for all."""
    with tempfile.NamedTemporaryFile() as file:
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.interpreted_attention", file.name, *checks],
                              env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(file.name, weights_only=True)


def found_in(name):
    """What a check found that is made each time, or as one of the others."""
    return interpreted(*(OTHERS if name in OTHERS else (*EACH_TIME, "the operator", "bits")))[name]


@pytest.mark.parametrize("name", tried(CASES, EACH_TIME))
def test_errors_are_at_most_twice_the_definitions_in_the_same_dtype(name):
    found = found_in(name)
    for ours, definition in zip(found["ours"], found["definition"], strict=True):
        assert ours <= 2 * definition + 2e-7


@pytest.mark.parametrize("name", tried(CASES, EACH_TIME))
def test_filler_has_no_context_no_gradient_and_no_part_in_others(name):
    """It is not a number in these cases: whatever took part in anything would show."""
    assert found_in(name)["filler"] == [True, True]


@pytest.mark.parametrize("name", tried(UNSEEN, EACH_TIME))
def test_blocks_that_nothing_sees_are_not_read(name):
    assert found_in(name) == [True, True]


def test_the_operator_is_what_torch_expects_of_one():
    assert found_in("the operator") is None  # it raises


@pytest.mark.table
def test_the_longest_protein_of_all_is_done_in_blocks():
    found = found_in("titin")
    for ours, theirs in zip(found["ours"], found["by protein"], strict=True):
        assert ours <= 2 * theirs + 2e-7


def test_the_same_bits_come_each_time_whatever_else_is_packed():
    once, again, beside = (found_in("bits")[name] for name in ("once", "again", "beside another protein"))
    for first, second, third in zip(once, again, beside, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[21:], third[21:])
        assert not torch.equal(first[:21], third[:21])


def test_rows_of_any_number_of_proteins_run_the_same_code():
    from benchmarks.compiled import RecordedLaunch
    from megatron.kernels.attention import triton_kernels
    from megatron.kernels.attention.launches import Call

    keys = set()
    for num_proteins in (1, 2, 3, 16, 37, 64, 100):
        with torch.device("meta"):
            qkv, ends = torch.empty(8000, 4, 3, 64), torch.empty(num_proteins + 1, dtype=torch.int32)
            context, statistics = torch.empty(8000, 4, 1, 64), torch.empty(4, 8000)
            call = Call(qkv, None, ends, None, 0, 0, -1, -1, 0, 0)
            launches = [call.forward(context, statistics),
                        *call.backward(context, context, statistics, statistics, (torch.empty_like(qkv), ends))]
        for launch in launches:
            kernel, named = getattr(triton_kernels, launch.kernel), {**launch.arguments, **launch.constants}
            keys.add(RecordedLaunch(kernel, tuple(named[name] for name in kernel.arg_names), launch.options).key)
    assert len(keys) == 3


@pytest.mark.parametrize("capability", tried([80, 90, 100], [90]))
def test_the_kernels_compile_without_spills_and_fit_a_gpus_shared_memory(capability, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.triton_kernels import MOST_SHARED, cases

    seen = set()
    for case in cases(["proteinlm-3b"]):
        if "bfloat16" in case.name and "cross_entropy" not in case.name:
            cost = case.launch.resources(capability)
            assert cost.spilled == 0 and cost.registers <= 255
            assert 0 < cost.shared <= MOST_SHARED[capability]
            seen.add(case.name.rpartition(": ")[2])
    assert seen == {"forward", "backward_queries", "backward_keys", "maps map_kernel"}


@pytest.mark.table
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_of_every_preset_compile_in_its_precision_and_in_fp32(capability, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.triton_kernels import MOST_SHARED, cases

    widths = set()
    for case in cases(list(PRESETS)):
        if "cross_entropy" not in case.name:
            cost = case.launch.resources(capability)
            assert cost.spilled <= (8 if "float32" in case.name else 0), case.name
            assert cost.shared <= MOST_SHARED[capability], case.name
            widths.add(int(case.name.partition("width ")[2].split(",")[0].split(":")[0]))
    assert widths >= {16, 24, 32, 64, 128}


def test_fp32_is_multiplied_as_it_is_and_under_tf32_in_that(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.triton_kernels import cases

    def forward_code():
        forward = next(case for case in cases(["proteinlm-3b"]) if "float32" in case.name and "forward" in case.name)
        return forward.launch.compiled(80).asm["ptx"]

    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        in_tf32 = forward_code()
    finally:
        products.fp32_precision = before
    assert ".tf32" in in_tf32 and ".tf32" not in forward_code()


@pytest.fixture
def gpu(monkeypatch):
    """Passes CPU tensors off as a GPU's; sets whether Triton is there, and whether the GPU is of Ampere or later."""
    def stand(has_triton, is_of_ampere):
        for name, answer in (("takes_gpu_way", True), ("has_triton", has_triton), ("is_of_ampere", is_of_ampere),
                             ("runs_triton", has_triton and is_of_ampere)):
            monkeypatch.setattr(backends, name, lambda _=None, answer=answer: answer)
        monkeypatch.setattr(by_protein, "takes_gpu_way", lambda _: True)

    return stand


def test_a_gpu_without_triton_is_told_what_to_install(gpu):
    gpu(has_triton=False, is_of_ampere=True)
    half = torch.empty(4, 1, 3, 16, dtype=torch.bfloat16)
    for tensor, dropout in ((half, 0.1), (half.float(), 0.0), (half[..., :12], 0.0)):
        with pytest.raises(ConfigError, match="pip install triton"):
            choose(tensor, bool(dropout), None)
    assert choose(half, False, None) == "varlen"


@pytest.mark.parametrize(("is_of_ampere", "dtype", "width"), [(False, torch.float16, 16), (True, torch.float64, 16),
                                                              (True, torch.bfloat16, 320)])
def test_a_gpu_that_no_operator_takes_says_that_it_goes_by_protein(gpu, is_of_ampere, dtype, width):
    gpu(has_triton=True, is_of_ampere=is_of_ampere)
    with pytest.warns(UserWarning, match="one protein at a time"):
        packed_attention(torch.randn(9, 1, 3, width).to(dtype), packed_batch(5, 4).sequence, 0.0)
