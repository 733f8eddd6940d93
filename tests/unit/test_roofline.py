"""The theoretical roofline agrees with counts by hand, PyTorch's own counter, and the model's FLOPs."""

import importlib
import pkgutil
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction  # noqa: E402

import megatron.kernels  # noqa: E402
from benchmarks import roofline, roofline_lines  # noqa: E402
from benchmarks.launched import NUM_IDS, launches_of_block, launches_of_update  # noqa: E402
from benchmarks.proteins import shipped_lengths, shipped_rows  # noqa: E402
from megatron.data.batches.batch import BatchShape, collate  # noqa: E402
from megatron.data.rows.packed import Row  # noqa: E402
from megatron.model.flops import model_flops  # noqa: E402

HIDDEN, FEED_FORWARD, HEADS, LAYERS = 128, 384, 2, 1
TINY = (f"--preset esm2-8m --num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} "
        f"--ffn-hidden-size {FEED_FORWARD}")
# Of megatron.kernels what launches nothing by itself: choosers, CPUs' ways, what a kernel's module is launched by.
WITHOUT_KERNELS = {
    "attention", "attention.backends", "attention.by_protein", "attention.native", "attention.launches",
    "attention.maps", "attention.packed", "cross_entropy", "device", "dropout", "newton_schulz",
    "newton_schulz.orthogonal", "newton_schulz.symmetric", "packed_sequence", "pointwise", "pointwise.activation",
    "pointwise.native", "pointwise.convolution", "pointwise.heads", "pointwise.product", "pointwise.residual_norm",
    "rotary"}
INSIDE_OTHERS = {"dropout_triton", "pointwise.head_rows_triton"}  # functions that kernels of other modules call


@cache
def step():
    return roofline_lines.step_of(TINY)


@cache
def instead():
    here = step()
    return roofline_lines.lines_instead(TINY, (*here.block, *here.around, *here.update))


def line(lines, kernel, side):
    return next(each for each in lines if each.kernel == kernel and each.side == side)


def attention_of(lengths, flags=""):
    """Attention's lines of a block on proteins of these lengths."""
    config = roofline_lines.config_of(f"{TINY} {flags}")
    shape = BatchShape(1024, len(lengths), 1, max(lengths), num_ends=2)
    row = Row(np.zeros(sum(lengths), np.int64), np.array(lengths), np.array([1]), np.array([5]))
    lines = roofline_lines.lines_of(launches_of_block(config, batch=collate([row], shape)))
    return [each for each in lines if each.kernel.startswith("attention")]


@pytest.mark.parametrize("lengths", [(700,), (700, 100, 100, 24)])
def test_attention_computes_two_products_of_each_protein_forward_and_five_backward(lengths):
    forward, backward = attention_of(lengths)
    squares = sum(length**2 for length in (*lengths, 1024 - sum(lengths)))  # PyTorch takes filler for a protein
    assert forward.flops == 2 * 2 * squares * HIDDEN and backward.flops == 5 * 2 * squares * HIDDEN


def test_tritons_attention_spares_the_filler_and_computes_scores_and_their_gradients_twice_backward():
    forward, backward = attention_of((700,), "--attention-dropout 0.1")
    assert forward.flops == 2 * 2 * 700**2 * HIDDEN and backward.flops == 7 * 2 * 700**2 * HIDDEN


def test_attention_moves_queries_keys_values_context_and_a_number_for_each_query():
    forward, backward = attention_of((700, 100, 100, 24), "--attention-dropout 0.1")
    rows, numbers = 1024 * HIDDEN * 2, 1024 * HEADS * 4
    few = 1024  # bytes of boundaries and seed
    assert 0 < forward.num_bytes - (4 * rows + numbers) < few
    assert 0 < backward.num_bytes - (8 * rows + numbers) < few


def test_a_join_moves_residual_branch_sum_and_normed_once_and_its_vectors():
    join = line(step().block, "bias, residual and LayerNorm", "forward")
    tokens = 16 * 1024
    assert join.num_bytes == 4 * tokens * HIDDEN * 2 + 3 * HIDDEN * 4 + 2 * tokens * 4


@pytest.mark.parametrize("kernel, side, operations", [
    ("LayerNorm", "forward", 7),  # sum, centre, square, sum, by the length, the scale, the bias
    ("bias, residual", "forward", 2), ("convolution", "forward", 10), ("bias and squared_relu", "forward", 3)])
def test_operations_of_an_element_are_those_of_the_formula(kernel, side, operations):
    found = line([*step().block, *instead()], kernel, side)
    elements = 16 * 1024 * (FEED_FORWARD if "relu" in kernel else 3 * HIDDEN if "conv" in kernel else HIDDEN)
    assert found.flops / elements == pytest.approx(operations, abs=0.1)  # and those of a row


def test_products_of_a_block_are_as_many_as_pytorchs_counter_finds():
    config, batch = step().config, step().batch
    with FlopCounterMode(display=False) as counter:
        lines = roofline_lines.lines_of(launches_of_block(config, batch=batch))
    found = counter.get_flop_counts()["Global"]
    assert sum(each.flops for each in lines if each.kernel == "matrix products") == (
        found[torch.ops.aten.mm] + found[torch.ops.aten.addmm])


def test_products_of_a_step_are_the_models_flops():
    batch, blocks, around = step().batch, step().block, step().around
    whole = len(batch.sequence.tokens_t)
    products = LAYERS * sum(each.flops for each in blocks if each.kernel == "matrix products")
    products += sum(each.flops for each in around if each.kernel == "matrix products")
    num_targets = len(batch.targets.ids_m)  # those that are none are multiplied too, and so is filler
    assert products == model_flops(step().config.model, NUM_IDS, whole, 0, num_targets)


@pytest.mark.parametrize("lines, kernel, moved", [
    (lambda: step().update, "AdamW", 32),  # weight, gradient and two moments, in and out
    (lambda: step().update, "norm of gradients", 4)])
def test_the_update_moves_so_many_bytes_a_parameter(lines, kernel, moved):
    vectors = 2 * HIDDEN + 2 * HIDDEN + 3 * HIDDEN + HIDDEN + FEED_FORWARD + HIDDEN
    block = 4 * HIDDEN**2 + 2 * HIDDEN * FEED_FORWARD + vectors
    outside = NUM_IDS * HIDDEN + 2 * HIDDEN + HIDDEN**2 + 3 * HIDDEN + NUM_IDS
    assert line(lines(), kernel, "update").num_bytes == pytest.approx(moved * (LAYERS * block + outside), rel=0.005)


def test_three_steps_of_newton_schulz_compute_half_of_the_symmetric_products_and_one_whole():
    shapes = [(HIDDEN, HIDDEN)] * (4 * LAYERS + 1) + 2 * LAYERS * [(HIDDEN, FEED_FORWARD)]  # with the head's
    found = {kernel: line(instead(), f"Muon: {kernel}", "update").flops for kernel in (
        "X Xᵀ, half", "a A + b A², half", "matrix products")}
    assert found == {"X Xᵀ, half": 3 * sum(m * (m + 1) * n for m, n in shapes),
                     "a A + b A², half": 3 * sum(m * (m + 1) * m for m, _ in shapes),
                     "matrix products": 3 * sum(2 * m * m * n for m, n in shapes)}


def test_muon_passes_over_gradients_once_before_the_iteration_and_over_weights_once_after_it():
    elements = (4 * LAYERS + 1) * HIDDEN**2 + 2 * LAYERS * HIDDEN * FEED_FORWARD
    momentum, step_, casts = (line(instead(), f"Muon: {kernel}", "update") for kernel in (
        "momentum", "decay and step", "PyTorch's copy, mul, index_select, cat"))
    assert (len(momentum.launches), len(step_.launches)) == (4 * LAYERS + 1, 4 * LAYERS + 1)
    assert momentum.num_bytes == pytest.approx(16 * elements, rel=1e-3)  # both are read and written in fp32
    assert step_.num_bytes == pytest.approx(10 * elements, rel=1e-3)  # weights, and the update in bf16
    assert casts.num_bytes < 20 * elements  # to bf16, scaled, and queries, keys and values apart


@pytest.mark.parametrize("recipe, both_ways", [("tensorwise or delayed", 1), ("rowwise", 2)])
def test_fp8_reads_a_tensor_for_its_magnitudes_and_again_to_write_a_byte_an_element(recipe, both_ways):
    elements = 16 * 1024 * (3 * HIDDEN + FEED_FORWARD) * both_ways  # before the four products of a block
    scales = 16 * 1024 * 4 * 4 * 6
    for what, moved in (("largest magnitudes", 2), ("scaled and cast", 3)):
        num_bytes = line(instead(), f"FP8, {recipe}: {what}", "forward").num_bytes
        assert moved * elements <= num_bytes < moved * elements + scales


def test_maps_are_written_once_in_fp32_from_queries_and_keys():
    lengths = step().batch.sequence.cu_seqlens.diff()[:-1].double()
    maps = line(instead(), "attention maps (contacts)", "forward")
    squares, tokens = float(lengths.square().sum()), float(lengths.sum())
    assert maps.flops == pytest.approx(2 * HIDDEN * squares, rel=1e-3)
    assert maps.num_bytes == pytest.approx(HEADS * 4 * squares + 2 * 2 * HIDDEN * tokens, rel=0.01)


def test_every_module_of_kernels_has_a_line_or_launches_nothing():
    modules = {found.name.removeprefix("megatron.kernels."): found.name
               for found in pkgutil.walk_packages(megatron.kernels.__path__, "megatron.kernels.")
               if not found.name.rpartition(".")[2].startswith("_")}
    lines = {module for each in (*step().block, *step().around, *instead()) for module in each.modules}
    assert lines == modules.keys() - WITHOUT_KERNELS - INSIDE_OTHERS
    holds_kernels = {short for short, name in modules.items() if any(
        isinstance(value, JITFunction) and value.__module__ == name
        for value in vars(importlib.import_module(name)).values())}
    assert holds_kernels <= lines | INSIDE_OTHERS


def test_a_floor_is_the_longer_of_memory_and_arithmetic_launch_by_launch():
    from benchmarks.compiled import Other

    waits, computes = Other("copy_", 3_350_000, 0, "fp32"), Other("mm", 1000, 989_000_000, "half")
    assert roofline.floor_s([waits, computes], "H100") == pytest.approx(2e-6)
    assert roofline.floor_s([waits], "H200") == pytest.approx(1e-6 * 3.35 / 4.8)
    assert roofline.floor_s([replace(computes, units="fp8")], "H200") == pytest.approx(1e-6 * 989 / 1979)


@pytest.mark.parametrize("card", roofline.CARDS)
def test_a_bound_grows_with_the_micro_batches_of_an_update_and_stays_below_the_peak(card):
    often, seldom = (roofline.bound(step(), card, number) for number in (1, 128))
    assert often.mfu < seldom.mfu < 1 and often.products_s * 128 == pytest.approx(seldom.products_s)
    assert seldom.residues_per_s / seldom.tokens_per_s == pytest.approx(
        step().batch.num_residues / step().batch.num_tokens)


def test_counted_proteins_are_those_that_are_shipped():
    batch, lengths = shipped_rows(step().config.data, 16), shipped_lengths()
    assert len(lengths) == 4000 and lengths.sum() == 1_555_475
    tokens = np.minimum(lengths + 2, 1024)
    assert batch.num_pairs / batch.num_tokens == pytest.approx((tokens**2).sum() / tokens.sum(), rel=0.02)
    assert batch.num_tokens > 0.99 * 16 * 1024
    assert batch.num_targets == pytest.approx(0.15 * batch.num_residues, rel=0.01)


def test_the_tables_have_a_row_a_kernel_and_a_bound_a_card(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "MODELS", {"133M": TINY})
    monkeypatch.setattr(roofline, "step_of", lambda _: step())
    monkeypatch.setattr(roofline, "lines_instead", lambda *_: instead())
    monkeypatch.setattr(sys, "argv", ["roofline.py"])
    roofline.main()
    rows = [each.split(" | ") for each in capsys.readouterr().out.splitlines() if each.startswith("| ")]
    assert all(any(each.kernel == row[0].removeprefix("| ") for row in rows) for each in (*step().block, *instead()))
    assert [row[1] for row in rows if row[0] == "| 133M"] == ["H100", "H100", "H200", "H200"]
    assert any(row[0] == "| 133M in FP8" for row in rows)


def test_states_of_the_optimizer_are_not_made_in_the_step_that_is_counted():
    assert "zeros_like" not in {other.name for other in launches_of_update(step().config).others}
