"""FlexAttention with a mask by protein agrees with the definition.

On CPUs PyTorch refuses its backward pass; the tests lift that refusal. Forward and backward are then PyTorch's own
definition of the operation, and what torch.compile makes of it up to the graph of both. The code generated for GPUs is
not tested here but in tests/gpu.
"""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as theirs

from megatron.config import PrecisionConfig
from megatron.errors import ConfigError
from megatron.kernels.attention import backends, flex
from megatron.kernels.attention.packed import attention_reference, packed_attention
from megatron.model import transformer
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from tests.families import FAMILIES, MASK_ID
from tests.packed import packed_batch

WINDOWS = [None, (3, 1), (200, 100), (0, 0)]
ROWS = {"many": ((300, 1, 141, 7), 60), "few tokens": ((5, 3), 4), "one": ((700,), 0), "even": ((128, 128, 256), 0),
        "filler alone": ((), 300), "more filler than a block": ((130,), 400)}


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch):
    monkeypatch.setattr(theirs, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_compiled", lambda: theirs.flex_attention)
    torch.manual_seed(0)


def row(name):
    lengths, filler = ROWS[name]
    return packed_batch(*lengths, filler=filler, empty=2).sequence, sum(lengths)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_the_mask_of_blocks_is_that_which_all_pairs_of_tokens_give(name, window):
    sequence, _ = row(name)
    num_tokens = len(sequence.tokens_t)
    ours = flex.block_mask(sequence, num_tokens, window)
    exact = theirs.create_block_mask(ours.mask_mod, None, None, num_tokens, num_tokens, device="cpu")
    for kind in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, kind), getattr(exact, kind)), kind
    assert torch.equal(ours.to_dense(), exact.to_dense())
    assert ours.shape == exact.shape and ours.BLOCK_SIZE == exact.BLOCK_SIZE


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_contexts_and_gradients_are_the_definitions_and_filler_has_none(name, queries, window):
    sequence, size = row(name)
    qkv = torch.randn(len(sequence.tokens_t), 2, queries + 2, 16, requires_grad=True)
    context = flex.by_flex(qkv, sequence, window)
    exact = attention_reference(qkv[:size], sequence, None, window)
    torch.testing.assert_close(context[:size], exact, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(exact)
    everywhere = torch.cat([weights, torch.full_like(context[size:], 1e6)])
    ours, = torch.autograd.grad(context, qkv, everywhere)
    true, = torch.autograd.grad(exact, qkv, weights)
    torch.testing.assert_close(ours, true, atol=5e-6, rtol=1e-5)
    assert not context[size:].any() and not ours[size:].any()


def test_other_proteins_compile_nothing_anew(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(theirs.flex_attention, dynamic=False, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for lengths in ((300, 1, 141, 7), (200, 249), (449,)):
        sequence = packed_batch(*lengths, filler=60, empty=6 - len(lengths)).sequence
        qkv = torch.randn(509, 2, 3, 16, requires_grad=True)
        outcomes = [function(qkv, sequence)[:449] for function in (flex.by_flex, attention_reference)]
        weights = torch.randn_like(outcomes[0])
        gradients = [torch.autograd.grad(each, qkv, weights)[0][:449] for each in outcomes]
        torch.testing.assert_close(*outcomes, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(*gradients, atol=5e-6, rtol=1e-5)
    assert counter.frame_count == 1


def test_the_mask_needs_no_value_on_the_host():
    mode = FakeTensorMode()
    sequence = packed_batch(300, 40, filler=60, empty=2).sequence.map(mode.from_tensor)
    with mode:
        mask = flex.block_mask(sequence, 400, (5, 3))
    assert mask.kv_indices.shape == mask.q_indices.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("family", ["esm2", "recipe"])
def test_a_model_learns_the_same_and_makes_each_mask_once_a_micro_batch(family, is_compiled, monkeypatch):
    torch._dynamo.reset()
    flex_anywhere = replace(backends.BACKENDS["flex"], why_not=lambda *_: None)  # also where there is no GPU
    monkeypatch.setitem(backends.BACKENDS, "flex", flex_anywhere)
    config = replace(FAMILIES[family], num_layers=2, kv_channels=16)
    batch = packed_batch(30, 1, 17, filler=5, empty=1)
    outcomes = []
    for backend in ("auto", "flex"):
        model = ProteinModel(replace(config, attention_backend=backend), PrecisionConfig(), 32, mask_id=MASK_ID)
        initialise(dict(model.named_parameters()), 1)
        if is_compiled and backend == "flex":
            for block in model.blocks():
                block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        with patch.object(transformer, "with_masks", wraps=flex.with_masks) as made, patch.object(
                flex, "block_mask", wraps=flex.block_mask) as masks:
            loss, _ = model(batch.sequence, batch.targets)
            loss.backward()
        assert made.call_count == (backend == "flex")
        assert masks.call_count == (backend == "flex") * len({config.window(number) for number in range(2)})
        outcomes.append({"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()
                                                   if parameter.grad is not None}})
    for name, exact in outcomes[0].items():
        assert (outcomes[1][name] - exact).norm() <= 1e-5 * exact.norm() + 1e-7, name


def test_tensors_without_values_take_what_keeps_as_much():
    mode = FakeTensorMode()
    sequence = packed_batch(20, 33).sequence.map(mode.from_tensor)
    with mode:
        qkv = torch.empty(53, 2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
        context = packed_attention(qkv, sequence, None, None, "flex")
        gradient, = torch.autograd.grad(context, qkv, torch.empty_like(context))
    assert context.shape == (53, 2, 16) and gradient.shape == qkv.shape


def test_ways_that_cannot_be_honoured_are_refused_where_they_are_taken():
    sequence, qkv = packed_batch(5).sequence, torch.randn(5, 2, 3, 16)
    for backend in ("varlen", "triton", "flex"):
        with pytest.raises(ConfigError, match=f"--attention-backend {backend} .* is for GPUs, and this is a CPU; "
                                              "leave it at auto, or give .*plain"):
            packed_attention(qkv, sequence, None, None, backend)
    with pytest.raises(ConfigError, match=r"--attention-backend compiled .*give plain"):
        packed_attention(qkv.half(), sequence, None, None, "compiled")
    exact = attention_reference(qkv, sequence)
    torch.testing.assert_close(packed_attention(qkv, sequence, None, None, "plain"), exact, atol=2e-6, rtol=1e-5)
