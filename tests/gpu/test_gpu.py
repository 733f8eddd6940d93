"""What can be tested on a GPU only. Skipped without CUDA.

The cheapest and most telling tests come first, because `benchmarks/gpu.sh` stops this file after a time limit. The last
tests compile dozens of kernels, some seconds each.
"""

import io
import itertools
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron.config import PrecisionConfig
from megatron.kernels import fp8
from megatron.kernels.attention.fused import by_triton
from megatron.kernels.attention.packed import attention_reference, packed_attention
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.newton_schulz.symmetric import gram, symmetric_reference, with_square
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from pretrain_tape import main
from tests.families import FAMILIES, MASK_ID
from tests.golden.training import TINY, losses
from tests.interpreted import CHECKS, TOLERANCE
from tests.packed import packed_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = (300, 1, 17, 512, 90)
REAL, FILLER = sum(LENGTHS), 700
KINDS = FAMILIES | {
    "esm2 with norms of heads, in windows": replace(FAMILIES["esm2"], qk_layernorm=True, window_size=(5, 3)),
    "esm2 with a convolution": replace(FAMILIES["esm2"], qk_layernorm=True, qkv_conv_kernel=5)}


def curve(corpus, folder, *flags):
    with redirect_stdout(io.StringIO()):
        assert main([*TINY, "--data-path", corpus, "--save", str(folder), "--load", str(folder), *flags]) == 0
    return losses(folder)


def test_a_step_never_waits_for_the_device(corpus, tmp_path, monkeypatch):
    from megatron.train.step import train_step as module

    run_step, num_steps = module.TrainStep.__call__, itertools.count()

    def watched(self, *arguments):
        if next(num_steps) == 0:  # compiles, which waits
            return run_step(self, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(module.TrainStep, "__call__", watched)
    curve(corpus, tmp_path, "--bf16", "--train-iters", "5")


@pytest.mark.parametrize("is_compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_graphs_have_the_curve_of_steps_without_them(corpus, tmp_path, monkeypatch, is_compiled, precision):
    replay, num_replays = torch.cuda.CUDAGraph.replay, itertools.count()
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (next(num_replays), replay(graph)))
    flags = [precision, is_compiled, "--attention-dropout", "0.1", "--hidden-dropout", "0.1", "--train-iters", "12"]
    plain, graphs = (curve(corpus, tmp_path / str(len(more)), *flags, *more) for more in ([], ["--cuda-graph"]))
    assert all(graphs[step] == pytest.approx(plain[step], rel=1e-4) for step in plain)
    assert next(num_replays) >= 2 * 10 - 2  # micro-batch and update, but for what runs before they are captured


def test_the_curve_is_the_cpus_in_fp32(corpus, tmp_path, monkeypatch):
    gpu = curve(corpus, tmp_path / "gpu", "--train-iters", "12")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = curve(corpus, tmp_path / "cpu", "--train-iters", "12")
    assert all(gpu[step] == pytest.approx(cpu[step], rel=1e-4) for step in cpu)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_learns_and_resumes(corpus, tmp_path, precision):
    flags = [precision, "--attention-dropout", "0.1", "--hidden-dropout", "0.1",
             *(["--initial-loss-scale", "65536"] if precision == "--fp16" else [])]
    unbroken = curve(corpus, tmp_path / "unbroken", *flags, "--train-iters", "40")
    assert unbroken[40] < unbroken[1] - 1
    curve(corpus, tmp_path / "broken", *flags, "--train-iters", "40", "--exit-interval", "15")
    resumed = curve(corpus, tmp_path / "broken", *flags, "--train-iters", "40")
    assert all(resumed[step] == pytest.approx(unbroken[step], rel=1e-3) for step in unbroken)


def sequence():
    """The proteins, boundaries of proteins that are not there, and filler in two segments."""
    return packed_batch(*LENGTHS, filler=FILLER, empty=3).to("cuda").sequence


def weights_dropout(seed):
    return Dropout(0.2, torch.tensor(seed, device="cuda"), Use.PROBABILITIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_ranks_have_the_context_gradient_and_dropout_of_one(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(1600, 2, 4, 64, device="cuda").to(dtype)
    packed = packed_batch(*LENGTHS, filler=1600 - REAL, empty=3).to("cuda").sequence
    weights = torch.randn(1600, 4, 64, device="cuda").to(dtype)

    def outcome(num_ranks):
        x, contexts, size = qkv.clone().requires_grad_(), [], len(qkv) // num_ranks
        for first in range(0, len(qkv), size):
            query, keys = (x, None) if num_ranks == 1 else (x[first:first + size, :, :-2], x[:, :, -2:])
            contexts.append(by_triton(query, packed, weights_dropout(5), (300, 40), keys, first))
        context = torch.cat(contexts)
        return context.detach(), torch.autograd.grad(context, x, weights)[0]

    for one, four, again in zip(outcome(1), outcome(4), outcome(4), strict=True):
        assert (one - four).float().norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * one.float().norm()
        assert torch.equal(four, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_expected_context_and_repeats_with_its_seed(dtype):
    torch.manual_seed(0)
    qkv, packed = torch.randn(REAL + FILLER, 2, 3, 32, device="cuda").to(dtype), sequence()
    plain = packed_attention(qkv, packed, None)[:REAL].float()  # what filler gets is nobody's, and differs by the way
    contexts = torch.stack([packed_attention(qkv, packed, weights_dropout(seed))[:REAL].float() for seed in range(400)])
    assert (contexts.mean(0) - plain).norm() < 0.1 * plain.norm()
    assert torch.equal(packed_attention(qkv, packed, weights_dropout(5)),
                       packed_attention(qkv, packed, weights_dropout(5)))


def loss_and_gradients(family, device, is_compiled=False, is_bf16=False):
    """Of a small model of a family on some proteins."""
    model = ProteinModel(KINDS[family], PrecisionConfig(bf16=is_bf16), 128, mask_id=MASK_ID)
    initialise(dict(model.named_parameters()), 1)
    model.to(device)
    for block in model.blocks() if is_compiled else ():
        block.compile(fullgraph=True, dynamic=False)
    batch = packed_batch(60, 17, filler=30, empty=3).to(device)
    loss, _ = model(batch.sequence, batch.targets)
    loss.backward()
    return loss.item(), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()
                         if parameter.grad is not None}


@pytest.mark.parametrize("family", KINDS)
def test_in_bf16_every_kind_of_model_has_nearly_the_cpus_loss_and_gradients(family):
    (loss, gradients), (expected, theirs) = (loss_and_gradients(family, device, is_bf16=True)
                                             for device in ("cuda", "cpu"))
    assert loss == pytest.approx(expected, rel=1e-2)
    of_all = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-3 * of_all, name


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_has_the_cpus_loss_and_gradients_in_fp32(family, is_compiled):
    (loss, gradients), (expected, exact) = (loss_and_gradients(family, "cuda", is_compiled),
                                            loss_and_gradients(family, "cpu"))
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("is_compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_in_deterministic_mode_a_run_and_its_resumption_have_the_same_bits(corpus, tmp_path, precision, is_compiled):
    flags = [precision, is_compiled, "--deterministic-mode", "--train-iters", "20"]
    try:
        once, again = (curve(corpus, tmp_path / name, *flags) for name in ("once", "again"))
        curve(corpus, tmp_path / "broken", *flags, "--exit-interval", "8")
        assert once == again == curve(corpus, tmp_path / "broken", *flags)
    finally:
        torch.use_deterministic_algorithms(False)


def takes_fp8(scaling):
    return torch.cuda.get_device_capability() >= ((10, 0) if scaling == "mxfp8" else (8, 9))


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "mxfp8"])
@pytest.mark.parametrize("gradients", [fp8.E4M3, fp8.E5M2])
def test_products_in_fp8_are_those_of_the_numbers_that_they_multiply(scaling, gradients):
    if not takes_fp8(scaling):
        pytest.skip("this GPU does not multiply so")
    torch.manual_seed(0)
    a, b = (fp8.quantised(x, fp8.largest(x, scaling, 1), scaling, dtype) for x, dtype in (
        (torch.randn(320, 256, device="cuda").bfloat16(), gradients),
        (torch.randn(192, 256, device="cuda").bfloat16(), fp8.E4M3)))
    expected = fp8.product_reference(a, b, torch.float64)
    for is_fast, tolerance in ((False, 2.0**-8), (True, 2.0**-6)):
        for product in (fp8.product, torch.compile(fp8.product, fullgraph=True, dynamic=False)):
            ours = product(a, b, torch.bfloat16, is_fast).double()
            assert (ours - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "mxfp8"])
@pytest.mark.parametrize("is_compiled", ["--compile", "--no-compile"])
def test_a_run_in_fp8_has_nearly_the_curve_of_the_reference(corpus, tmp_path, monkeypatch, scaling, is_compiled):
    if not takes_fp8(scaling):
        pytest.skip("this GPU does not multiply so")
    flags = ["--bf16", "--fp8", "hybrid", "--fp8-recipe", scaling, "--train-iters", "12"]
    gpu = curve(corpus, tmp_path / "gpu", *flags, is_compiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = curve(corpus, tmp_path / "cpu", *flags)
    assert all(gpu[step] == pytest.approx(cpu[step], rel=2e-3) for step in cpu)


@pytest.mark.parametrize("shape", [(4, 256, 256), (2, 768, 3072), (1, 1280, 1280), (3, 100, 333)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muons_products_err_at_most_twice_as_much_as_plain_pytorchs_and_are_symmetric(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(*shape, device="cuda") / shape[2]**0.5).to(dtype)
    exact = symmetric_reference(x.double(), 0.0, 1.0)
    exact_square = symmetric_reference(gram(x).double(), -4.0, 2.0)
    for ours, theirs, true in ((gram(x), symmetric_reference(x, 0.0, 1.0), exact),
                               (with_square(gram(x), -4.0, 2.0), symmetric_reference(gram(x), -4.0, 2.0),
                                exact_square)):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
        assert torch.allclose(ours, ours.mT, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_muon_whose_iteration_is_in_bf16_there_has_nearly_the_cpus_curve(corpus, tmp_path, monkeypatch, optimizer,
                                                                         precision):
    flags = ["--optimizer", optimizer, precision, "--train-iters", "12"]
    gpu = curve(corpus, tmp_path / "gpu", *flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = curve(corpus, tmp_path / "cpu", *flags)
    assert all(gpu[step] == pytest.approx(cpu[step], rel=1e-2) for step in cpu)


@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith(("model", "recomputation"))])
def test_tritons_kernels_give_what_plain_pytorch_gives(check, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-5)  # exponentials and roots are approximate there
    torch.manual_seed(0)
    with torch.device("cuda"):
        CHECKS[check]()


def context_and_gradient(function, qkv_tgcd, weights_tnd, window):
    """Of the proteins' tokens; the gradient is that of all tokens."""
    qkv_tgcd = qkv_tgcd.detach().clone().requires_grad_()
    context_tnd = function(qkv_tgcd, sequence(), None, window)[:REAL]
    gradient, = torch.autograd.grad(context_tnd, qkv_tgcd, weights_tnd.to(context_tnd.dtype))
    return context_tnd.detach().float(), gradient.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "queries", "window"), [
    (16, 1, None), (64, 1, None), (128, 1, None), (64, 3, None), (64, 1, (30, 7)), (32, 2, (100, 200)), (24, 1, None),
    (20, 1, None), (72, 2, (30, 7)), (256, 1, None)])
def test_attentions_error_is_at_most_twice_plain_pytorchs_and_filler_has_no_gradient(dtype, width, queries, window):
    torch.manual_seed(0)
    qkv = torch.randn(REAL + FILLER, 4, queries + 2, width, device="cuda")
    weights = torch.randn(REAL, 4 * queries, width, device="cuda")
    exact = context_and_gradient(attention_reference, qkv.double(), weights.double(), window)
    fast = context_and_gradient(packed_attention, qkv.to(dtype), weights, window)
    plain = context_and_gradient(attention_reference, qkv.to(dtype), weights, window)
    for ours, theirs, true in zip(fast, plain, exact, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
    assert not fast[1][REAL:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "queries", "window"), [(16, 1, None), (64, 3, None), (64, 1, (30, 7)),
                                                          (24, 1, None)])
def test_flex_attentions_error_is_at_most_twice_plain_pytorchs(dtype, width, queries, window):
    torch.manual_seed(0)
    qkv = torch.randn(REAL + FILLER, 4, queries + 2, width, device="cuda")
    weights = torch.randn(REAL, 4 * queries, width, device="cuda")
    flex = partial(packed_attention, backend="flex")
    exact, ours, plain = (context_and_gradient(function, qkv.to(its), weights.to(its), window) for function, its in (
        (attention_reference, torch.float64), (flex, dtype), (attention_reference, dtype)))
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
    assert not ours[1][REAL:].any()
