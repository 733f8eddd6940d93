"""What only a GPU can show. Skipped without CUDA."""

import io
from contextlib import redirect_stdout

import pytest
import torch

from megatron.kernels.attention import attention_reference, packed_attention
from pretrain_tape import main
from tests.golden.training import TINY, losses
from tests.packed import packed_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = (300, 1, 17, 512, 90)
REAL, FILLER = sum(LENGTHS), 700


def sequence():
    """The proteins, boundaries of proteins that are not there, and filler in two segments."""
    return packed_batch(*LENGTHS, filler=FILLER, empty=3).to("cuda").sequence


def context_and_gradient(function, qkv_tn3d, weights_tnd):
    """Of the proteins' tokens; the gradient is that of all tokens."""
    qkv_tn3d = qkv_tn3d.detach().clone().requires_grad_()
    context_tnd = function(qkv_tn3d, sequence(), 0.0)[:REAL]
    gradient, = torch.autograd.grad(context_tnd, qkv_tn3d, weights_tnd.to(context_tnd.dtype))
    return context_tnd.detach().float(), gradient.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_attentions_error_is_at_most_twice_plain_pytorchs_and_filler_has_no_gradient(dtype, width):
    torch.manual_seed(0)
    qkv = torch.randn(REAL + FILLER, 4, 3, width, device="cuda")
    weights = torch.randn(REAL, 4, width, device="cuda")
    exact = context_and_gradient(attention_reference, qkv.double(), weights.double())
    fast = context_and_gradient(packed_attention, qkv.to(dtype), weights)
    plain = context_and_gradient(attention_reference, qkv.to(dtype), weights)
    for ours, theirs, true in zip(fast, plain, exact, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
    assert not fast[1][REAL:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_expected_context_and_repeats_with_its_seed(dtype):
    torch.manual_seed(0)
    qkv, packed = torch.randn(REAL + FILLER, 2, 3, 32, device="cuda").to(dtype), sequence()
    plain = packed_attention(qkv, packed, 0.0).float()
    contexts = torch.stack([packed_attention(qkv, packed, 0.2).float() for _ in range(400)])
    assert (contexts.mean(0) - plain).norm() < 0.1 * plain.norm()
    torch.manual_seed(5)
    first = packed_attention(qkv, packed, 0.2)
    torch.manual_seed(5)
    assert torch.equal(first, packed_attention(qkv, packed, 0.2))


def curve(corpus, folder, *flags):
    with redirect_stdout(io.StringIO()):
        assert main([*TINY, "--data-path", corpus, "--save", str(folder), "--load", str(folder), *flags]) == 0
    return losses(folder)


def test_the_curve_is_the_cpus_in_fp32(corpus, tmp_path, monkeypatch):
    gpu = curve(corpus, tmp_path / "gpu", "--train-iters", "12")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = curve(corpus, tmp_path / "cpu", "--train-iters", "12")
    assert all(gpu[step] == pytest.approx(cpu[step], rel=1e-4) for step in cpu)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_learns_and_resumes(corpus, tmp_path, precision):
    flags = [precision, "--attention-dropout", "0.1", "--hidden-dropout", "0.1", "--initial-loss-scale", "65536"]
    unbroken = curve(corpus, tmp_path / "unbroken", *flags, "--train-iters", "40")
    assert unbroken[40] < unbroken[1] - 1
    curve(corpus, tmp_path / "broken", *flags, "--train-iters", "40", "--exit-interval", "15")
    resumed = curve(corpus, tmp_path / "broken", *flags, "--train-iters", "40")
    assert all(resumed[step] == pytest.approx(unbroken[step], rel=1e-3) for step in unbroken)


def test_a_step_never_waits_for_the_device(corpus, tmp_path, monkeypatch):
    from megatron.train import step as module

    run_step = module.TrainStep.__call__

    def watched(self, *arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(module.TrainStep, "__call__", watched)
    curve(corpus, tmp_path, "--bf16", "--train-iters", "5")
