"""The line in which a run reports the implementation chosen for each operation."""

import os
from dataclasses import replace

import pytest
import torch

from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.kernels import device as choosing
from megatron.kernels.attention import backends, native
from megatron.kernels.pointwise import native as pointwise
from megatron.parallel.mesh import Axis, Mesh
from megatron.train.setup.ways import ways


def said(flags, mesh=None, is_compiled=False):
    config, _ = parse(["--preset", "esm2-8m", "--micro-batch-size", "1", *flags.split()])
    return ways(config, mesh or Mesh(device=torch.device("cpu")), is_compiled)


@pytest.mark.skipif(not native.INSTRUCTION_SETS, reason="the C++ helpers are not built")
def test_on_cpus_it_is_the_cpp_helper_and_why_it_is_not_where_it_is_not(monkeypatch):
    best = native.INSTRUCTION_SETS[0]
    assert said("").startswith(f"attention by the C++ helper ({best}); between matrix products the C++ helper")
    assert said("--fp16") == ("attention by PyTorch one protein at a time (the C++ helper takes fp32 and bf16); "
                              "between matrix products PyTorch, in several passes (the C++ helper takes fp32 and "
                              "bf16); the loss by PyTorch; the update by PyTorch's fused AdamW")
    monkeypatch.setattr(native, "INSTRUCTION_SETS", ())
    monkeypatch.setattr(pointwise, "_helper", None)
    assert said("").startswith("attention by PyTorch one protein at a time (the C++ helper is not built: that takes a "
                               "C++ compiler and pybind11); between matrix products PyTorch, in several passes "
                               "(the C++ helper is not built); ")


@pytest.mark.skipif(not pointwise.is_built(), reason="the C++ helpers are not built")
def test_a_convolution_that_the_cpp_helper_does_not_take_is_named():
    assert "between matrix products the C++ helper; " in said("--qkv-conv-kernel 7")
    assert "products the C++ helper, but for the convolution of 9 PyTorch; " in said("--qkv-conv-kernel 9")
    assert "products Triton's kernels; " in said("--qkv-conv-kernel 9", Mesh(device=torch.device("meta")))


def test_deterministic_mode_is_said():
    assert said("--deterministic-mode").endswith("; every sum in one order")


@pytest.mark.parametrize(("flags", "attention"), [
    ("", "PyTorch's varlen_attn (FA2)"), ("--attention-dropout 0.1", "Triton's kernels (varlen_attn takes no dropout)"),
    ("--no-bf16 --num-query-groups 10", "Triton's kernels (varlen_attn takes no groups of queries and no fp32)"),
    ("--kv-channels 12", "Triton's kernels (varlen_attn takes no width of 12)")])
def test_on_gpus_it_says_which_operator_and_what_the_other_lacks(flags, attention):
    rest = "the loss by Triton's kernels; the update by PyTorch's fused AdamW"
    assert said(flags, Mesh(device=torch.device("meta")), is_compiled=True) == (
        f"attention by {attention}; between matrix products torch.compile; {rest}")
    assert said(flags, Mesh(device=torch.device("meta"))).endswith(f"between matrix products Triton's kernels; {rest}")
    assert "torch.compile, but for dropout Triton's kernels; " in said(
        f"{flags} --hidden-dropout 0.1", Mesh(device=torch.device("meta")), is_compiled=True)


@pytest.mark.parametrize(("flags", "update"), [
    ("--optimizer muon", "Muon (its symmetric products {}) and PyTorch's fused AdamW"),
    ("--optimizer normuon", "NorMuon (its symmetric products {}) and PyTorch's fused AdamW"),
    ("--optimizer sgd", "PyTorch's SGD, all parameters at once"),
    ("--optimizer-backend apex", "apex (for which the host waits in every step)")])
def test_it_says_what_makes_the_update(flags, update):
    for device, products in (
            ("cpu", "whole by PyTorch, momentum and step by PyTorch"),
            ("meta", "half of each by Triton's kernels, momentum and step by torch.compile")):
        assert said(flags, Mesh(device=torch.device(device))).endswith(f"; the update by {update.format(products)}")


def test_where_triton_is_interpreted_the_update_is_not_said_to_be_compiled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "half of each by Triton's kernels, momentum and step by PyTorch)" in said("--optimizer muon")


@pytest.mark.parametrize(("flags", "way"), [
    ("--flash-attention FA3 --attention-dropout 0.1", "Triton's kernels (varlen_attn takes no dropout)"),
    ("--flash-attention FA4 --no-bf16", "Triton's kernels (varlen_attn takes no fp32)"),
    ("--flash-attention FA3 --attention-backend triton", "Triton's kernels (as --attention-backend says)"),
    ("--cuda-graph --attention-backend plain", "PyTorch one protein at a time (as --attention-backend says)"),
    ("--cuda-graph --kv-channels 512", "PyTorch one protein at a time, which is slow (no kernel takes")])
def test_what_a_way_of_attention_cannot_go_with_is_refused_by_name(flags, way):
    gpu = Mesh(device=torch.device("meta"))
    with pytest.raises(ConfigError) as error:
        said(flags, gpu)
    assert str(error.value).startswith(flags.split(" --")[0]) and f"attention is by {way}" in str(error.value)
    assert str(error.value).endswith("; leave it out")
    said(flags.split(" --")[0], gpu)


def test_flags_are_refused_by_the_name_of_a_back_end_whatever_it_is_called_in_messages(monkeypatch):
    for name, backend in backends.BACKENDS.items():
        monkeypatch.setitem(backends.BACKENDS, name, replace(backend, words="reworded"))
    gpu = Mesh(device=torch.device("meta"))
    assert said("--flash-attention FA3 --cuda-graph", gpu).startswith("attention by reworded (FA2); ")
    with pytest.raises(ConfigError, match="--flash-attention FA3 is for reworded"):
        said("--flash-attention FA3 --no-bf16", gpu)
    with pytest.raises(ConfigError, match="--cuda-graph cannot capture"):
        said("--cuda-graph --kv-channels 512", gpu)


@pytest.mark.parametrize(("asked", "flags", "why"), [
    ("varlen", "--attention-dropout 0.1", "takes no dropout; leave it at auto, or give triton"),
    ("varlen", "--no-bf16", "takes no fp32; leave it at auto, or give triton"),
    ("flex", "--attention-dropout 0.1", "takes no dropout; leave it at auto, or give triton or plain"),
    ("flex", "--kv-channels 8", "takes no width of 8; leave it at auto, or give varlen or triton or plain"),
    ("triton", "--kv-channels 320", "takes fp32, fp16 and bf16, heads up to 256 wide"),
    ("compiled", "", "is for CPUs, and this is a GPU; leave it at auto, or give varlen or triton or flex or plain")])
def test_a_way_that_cannot_be_had_on_a_gpu_is_refused_at_the_start(asked, flags, why):
    with pytest.raises(ConfigError, match=f"--attention-backend {asked} .*{why}"):
        said(f"--attention-backend {asked} {flags}", Mesh(device=torch.device("meta")))


@pytest.mark.parametrize("asked", ["varlen", "triton", "flex"])
def test_the_ways_of_gpus_are_refused_on_cpus_and_over_context_ranks(asked):
    with pytest.raises(ConfigError, match=f"--attention-backend {asked} .* is for GPUs, and this is a CPU"):
        said(f"--attention-backend {asked}")
    with pytest.raises(ConfigError, match="is for one context rank; leave it at auto, or --context-parallel-size at 1"):
        said(f"--attention-backend {asked}", Mesh(device=torch.device("meta"), context=Axis(0, 2)))


@pytest.mark.parametrize(("asked", "name"), [("varlen", "PyTorch's varlen_attn"), ("triton", "Triton's kernels"),
                                             ("flex", "PyTorch's FlexAttention, compiled"),
                                             ("plain", "PyTorch one protein at a time")])
def test_a_way_that_is_asked_for_is_said(asked, name):
    assert said(f"--attention-backend {asked}", Mesh(device=torch.device("meta"))).startswith(
        f"attention by {name} (as --attention-backend says); ")


def test_products_in_fp8_are_named_with_what_takes_them():
    recipe = "--fp8 hybrid --fp8-recipe rowwise"
    assert said(recipe).endswith("; the blocks' products in FP8 (hybrid, rowwise) by PyTorch in fp32, of numbers "
                                 "rounded to FP8 (slow: no CPU multiplies FP8)")
    assert said(recipe, Mesh(device=torch.device("meta"))).endswith("FP8 (hybrid, rowwise) by scaled_mm")


def test_blocks_with_and_without_a_window_are_both_named():
    mesh = Mesh(device=torch.device("meta"), context=Axis(0, 2))
    assert said("--window-size 4 4 --window-attn-skip-freq 2", mesh).startswith(
        "attention by Triton's kernels (varlen_attn takes no window over context ranks), and by PyTorch's varlen_attn "
        "(FA2);")


def test_a_gpu_without_triton_is_told_before_the_first_step(monkeypatch):
    for name, answer in (("has_triton", False), ("is_fake", False), ("is_of_ampere", True)):
        monkeypatch.setattr(backends, name, lambda _=None, answer=answer: answer)
    monkeypatch.setattr(backends, "runs_triton", lambda _: False)
    with pytest.raises(ConfigError, match="pip install triton"):
        said("--attention-dropout 0.1", Mesh(device=torch.device("meta")))


@pytest.mark.parametrize(("given", "told"), [(None, "1"), ("0", "0")])
def test_triton_is_told_to_fuse_products_with_sums_unless_the_user_told_it(monkeypatch, given, told):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", given or "")  # so that it is put back after the test
    if given is None:
        monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    choosing._prepared_triton.cache_clear()
    choosing.has_triton()
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == told
