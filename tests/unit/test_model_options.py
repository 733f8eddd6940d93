"""Each option of the model agrees with its definition, and all of them work on packed proteins."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import ModelConfig, OptimizerConfig, PrecisionConfig
from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.kernels.attention import native
from megatron.kernels.pointwise.heads import normed_heads, prepared_heads
from megatron.kernels.rotary import rotate_reference, rotation_of
from megatron.model.attention import Attention, ShortConvolution, ValueEmbedding
from megatron.model.embedding import token_dropout_scales
from megatron.model.flops import model_flops
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.model.transformer import Block
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.mesh import Axis
from megatron.parallel.tensor.stream import ONE_RANK_STREAM
from tests.families import FAMILIES, MASK_ID, PROTEINLM, RECIPE
from tests.packed import packed_batch

LENGTHS = (20, 1, 33, 7)


def make_model(config, precision=None):
    """A model in which no option is without effect: what starts at 0 or 1 is near it."""
    model = ProteinModel(config, precision or PrecisionConfig(), 128, mask_id=MASK_ID)
    initialise(dict(model.named_parameters()), 1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, sequence):
    return model.logits(model.hidden(sequence))


def alone(sequence, start, length):
    return replace(sequence, tokens_t=sequence.tokens_t[start:start + length],
                   positions_t=sequence.positions_t[start:start + length],
                   cu_seqlens=torch.tensor([0, length], dtype=torch.int32), num_filler=0)


def gradients(model, batch):
    model.zero_grad()
    loss, _ = model(batch.sequence, batch.targets)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()
                           if parameter.requires_grad}


def block(config, number=0):
    layer = Block(config, number, 128, torch.float32, ONE_RANK_STREAM)
    initialise(dict(layer.named_parameters()), 1)
    return layer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proteins_logits_do_not_change_with_what_it_is_packed_beside(family):
    model, sequence = make_model(FAMILIES[family]), packed_batch(*LENGTHS, filler=5).sequence
    packed, start = logits(model, sequence), 0
    for length in LENGTHS:
        by_itself = logits(model, alone(sequence, start, length))
        assert (packed[start:start + length] - by_itself).norm() < 1e-5 * by_itself.norm()
        start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_is_trained_has_a_gradient_and_filler_and_padding_change_none(family):
    model = make_model(FAMILIES[family])
    (loss, expected), (padded_loss, grads) = (gradients(model, packed_batch(*LENGTHS, **padding)) for padding in (
        {}, {"filler": 30, "empty": 4, "padding": 9}))
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert (grads[name] - gradient).norm() <= 3e-6 * gradient.norm() + 1e-6, name
    assert {name for name, _ in model.named_parameters()} - expected.keys() == {
        name for name, _ in model.named_parameters() if name.startswith("contact_head.")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_no_bit_of_any_kind_of_model(family, dropout):
    config = replace(FAMILIES[family], attention_dropout=dropout, hidden_dropout=dropout)
    results = []
    for each in (config, replace(config, checkpoint_activations=True),
                 replace(config, checkpoint_activations=True, checkpoint_num_layers=3),
                 replace(config, recompute_granularity="selective")):
        model = make_model(each)
        torch.manual_seed(9)
        results.append(gradients(model, packed_batch(20, 10, filler=5, padding=2)))
    for loss, named in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(named[name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close(family):
    batch = packed_batch(20, 33)
    (loss, exact), (half_loss, half) = (gradients(make_model(FAMILIES[family], precision), batch)
                                        for precision in (PrecisionConfig(), PrecisionConfig(bf16=True)))
    assert half_loss.item() == pytest.approx(loss.item(), rel=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in half.values())
    off, whole = (torch.cat([each.flatten() for each in named]).norm() for named in (
        [half[name] - exact[name] for name in exact], exact.values()))
    assert off < 0.1 * whole


@pytest.mark.parametrize("name", ["esm2", "protbert"])
def test_model_flops_are_what_torch_counts(name, monkeypatch):
    monkeypatch.setattr(native, "INSTRUCTION_SETS", ())  # torch counts its own products alone
    model, batch = make_model(FAMILIES[name]), packed_batch(20, 33, 5)
    with FlopCounterMode(display=False) as counter:
        model(batch.sequence, batch.targets)[0].backward()
    formula = model_flops(FAMILIES[name], 128, batch.num_tokens, batch.num_pairs, batch.num_targets)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_window_leaves_fewer_flops():
    wide, narrow = (model_flops(replace(PROTEINLM, window_size=window), 128, 1000, 1000**2, 10)
                    for window in (None, (3, 3)))
    assert wide - narrow == 12 * PROTEINLM.num_layers * 32 * (1000**2 - 1000 * 7)


def test_norm_placements_are_their_formulas():
    sequence, x = packed_batch(7, 4).sequence, torch.randn(11, 32)
    pre, post, both = (block(replace(PROTEINLM, norm_placement=placement)) for placement in ("pre", "post", "both"))
    inner = pre.attention, pre.mlp  # the same weights in all of them: they depend on names

    def norm(x):
        return F.layer_norm(x, (32,))

    def attention(x):
        return inner[0](x, sequence, None)[0]

    def feed_forward(x):
        return inner[1](x)[0]

    y = x + attention(norm(x))
    torch.testing.assert_close(pre(x, sequence), y + feed_forward(norm(y)))
    y = norm(x + attention(x))
    torch.testing.assert_close(post(x, sequence), norm(y + feed_forward(y)))
    y = x + norm(attention(norm(x)))
    torch.testing.assert_close(both(x, sequence), y + norm(feed_forward(norm(y))))


def test_rms_norm_and_activations_are_their_formulas():
    x = torch.randn(9, 32)
    rms = block(replace(PROTEINLM, normalization="RMSNorm")).input_layernorm
    assert [name for name, _ in rms.named_parameters()] == ["weight"]
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * rms.weight)
    squared = block(replace(PROTEINLM, squared_relu=True)).mlp
    wide = F.linear(x, squared.dense_h_to_4h.weight).clamp(min=0)**2
    torch.testing.assert_close(squared(x)[0], F.linear(wide, squared.dense_4h_to_h.weight))
    gated = block(replace(PROTEINLM, swiglu=True, disable_bias_linear=True)).mlp
    gate, wide = (F.linear(x, layer.weight) for layer in (gated.gate, gated.dense_h_to_4h))
    torch.testing.assert_close(gated(x)[0], F.linear(gate * gate.sigmoid() * wide, gated.dense_4h_to_h.weight))
    assert not [name for name, _ in gated.named_parameters() if "bias" in name]


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_each_head_is_normalised_by_itself_with_a_scale_of_its_own(kind):
    weight, x = torch.randn(32), torch.randn(5, 2, 2, 8)
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.view(2, 2, 8)
    torch.testing.assert_close(normed_heads(x, weight, 1e-5, kind == "RMSNorm"), expected)


@pytest.mark.parametrize("width", [8, 4])
def test_rotation_is_its_definition_and_scores_depend_on_distance_alone(width):
    torch.manual_seed(0)
    positions = torch.arange(6)
    qkv = torch.randn(1, 2, 4, 8, dtype=torch.float32).expand(6, -1, -1, -1).contiguous().requires_grad_()
    rotation = rotation_of(positions, width, 100.0)
    [turned], reference = prepared_heads(qkv, None, rotation), rotate_reference(qkv, rotation)
    torch.testing.assert_close(turned, reference)
    weights = torch.randn_like(turned)
    torch.testing.assert_close(*(torch.autograd.grad(each, qkv, weights)[0] for each in (turned, reference)))
    assert torch.equal(turned[:, :, -1], qkv[:, :, -1])  # values
    assert torch.equal(turned[..., width:], qkv[..., width:])
    pair = turned[3, 0, 0, [1, 1 + width // 2]]
    angle = torch.tensor(3 * 100.0 ** (-2 / width))
    x, y = qkv[3, 0, 0, [1, 1 + width // 2]]
    expected = torch.stack([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()])
    torch.testing.assert_close(pair, expected)
    scores = torch.einsum("td,sd->ts", turned[:, 0, 0], turned[:, 0, -2])
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_rotation_by_pytorch_is_in_fp32_and_rounded_once_forward_and_backward():
    torch.manual_seed(0)
    rotation = rotation_of(torch.arange(50), 16, 100.0)
    qkv, outer = torch.randn(2, 50, 2, 4, 32).half()  # no kernel on CPUs takes fp16
    qkv.requires_grad_()
    wide = qkv.detach().float().requires_grad_()
    [turned], exact = prepared_heads(qkv, None, rotation), rotate_reference(wide, rotation)
    assert torch.equal(turned, exact.half())
    gradient, = torch.autograd.grad(turned, qkv, outer)
    assert torch.equal(gradient, torch.autograd.grad(exact, wide, outer.float())[0].half())


def test_angles_are_fp32_where_activations_are_bf16():
    """At position 1,000 a bf16 angle would be off by 4 radians."""
    qkv = torch.ones(1, 1, 3, 64, dtype=torch.bfloat16)
    rotation = rotation_of(torch.tensor([1000]), 64, 10000.0)
    assert rotation.cos.dtype == torch.float32
    exact = rotate_reference(qkv.double(), rotation)
    assert (prepared_heads(qkv, None, rotation)[0] - exact).abs().max() < 0.01


def test_token_dropout_scales_each_protein_by_what_of_it_is_masked():
    sequence = packed_batch(10, 4, 5, 2, 1, filler=3, empty=2).sequence
    sequence.tokens_t[:] = 9
    sequence.tokens_t[[2, 3, 7, 11, 20, 21]] = MASK_ID
    scales = token_dropout_scales(sequence, MASK_ID, Axis())
    expected = torch.tensor([0.88 / 0.7] * 10 + [0.88 / 0.75] * 4 + [0.88] * 5 + [0.88 / 0.5] * 2 + [0.0] + [0.88] * 3)
    torch.testing.assert_close(scales, expected.masked_fill(sequence.tokens_t == MASK_ID, 0.0))


def test_the_short_convolution_is_torchs_on_each_protein_by_itself():
    layer = ShortConvolution(6, 5, ONE_RANK_STREAM)
    torch.nn.init.normal_(layer.weight)
    x, lengths = torch.randn(13, 6), (4, 8, 1)
    pieces = [piece + F.conv1d(piece.T[None], layer.weight[:, None], padding=2, groups=6)[0].T
              for piece in x.split(lengths)]
    torch.testing.assert_close(layer(x, packed_batch(*lengths).sequence), torch.cat(pieces))


def test_values_are_mixed_with_an_embedding_of_the_token():
    layer = ValueEmbedding(replace(PROTEINLM, num_query_groups=2), 128, ONE_RANK_STREAM)
    initialise(dict(layer.named_parameters()), 1)
    with torch.no_grad():
        layer.scales.copy_(torch.tensor([0.25, 3.0]))
    qkv, tokens = torch.randn(5, 2, 4, 8), torch.tensor([7, 9, 7, 100, 3])
    mixed = layer(qkv, tokens)
    assert torch.equal(mixed[:, :, :-1], qkv[:, :, :-1])
    torch.testing.assert_close(mixed[:, :, -1], 0.25 * qkv[:, :, -1] + 3 * layer.weight[tokens].view(5, 2, 8))


def test_skips_join_the_blocks_that_are_as_far_from_the_ends():
    config = replace(PROTEINLM, num_layers=5, unet_skips=True)
    blocks = list(make_model(config).blocks())
    assert [each.gives_skip for each in blocks] == [True, True, False, False, False]
    assert [each.takes_skip for each in blocks] == [False, False, False, True, True]


def test_at_the_start_the_recipes_blocks_change_nothing_and_their_skips_add_up():
    model = ProteinModel(RECIPE, PrecisionConfig(), 128)
    initialise(dict(model.named_parameters()), 1)
    sequence = packed_batch(9, 4).sequence
    embedded = model.embedding(sequence)
    # Each of the later half adds what the earlier half gave: x becomes 2x, then 3x. The final norm is blind to that.
    hidden = model.transformer(embedded, sequence)
    torch.testing.assert_close(hidden, F.rms_norm(3 * embedded, (32,), eps=1e-5))


def test_softcapped_logits_stay_within_the_cap():
    model, sequence = make_model(RECIPE), packed_batch(9, 4).sequence
    with torch.no_grad():
        model.lm_head.decoder.weight.mul_(1000)
    capped = logits(model, sequence)
    assert capped.abs().max() <= 15
    model.lm_head.softcap = None
    torch.testing.assert_close(capped, 15 * torch.tanh(logits(model, sequence) / 15))


def test_the_untied_head_has_a_matrix_of_its_own_in_its_group():
    model = make_model(RECIPE)
    assert model.lm_head.decoder.weight.shape == model.embedding.word_embeddings.weight.shape
    assert model.lm_head.decoder in set(model.matrices())
    assert model.embedding.word_embeddings not in set(model.matrices())
    assert model.lm_head.decoder.weight.declaration.group == "head"


def test_groups_of_parameters_step_by_their_own_learning_rates_on_the_course_of_all():
    model = make_model(FAMILIES["esm2"])
    named = dict(model.named_parameters())
    config = OptimizerConfig(weight_decay=0.0, clip_grad=0.0, embedding_lr=2e-3, head_lr=3e-3, scalar_lr=5e-4)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    Optimizer(named, config, peak_lr=1e-3).step(1e-4, LossScale(PrecisionConfig(), torch.device("cpu")))
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in named.items()}
    assert moved["embedding.word_embeddings.weight"] == pytest.approx(2e-4, rel=1e-2)
    assert moved["lm_head.bias"] == pytest.approx(3e-4, rel=1e-2)
    assert moved["transformer.final_layernorm.weight"] == pytest.approx(5e-5, rel=1e-2)
    assert moved["lm_head.dense.weight"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["contact_head.weight"] == 0


BASE = "--seq-length 64 --micro-batch-size 1 --lr 1e-3 --train-iters 2 --num-layers 2 --hidden-size 32 "\
       "--num-attention-heads 4".split()


@pytest.mark.parametrize(("flags", "remedy"), [
    ("--num-query-groups 3", "divisor"), ("--group-query-attention", "--num-query-groups"),
    ("--swiglu --squared-relu", "give one"), ("--swiglu --openai-gelu", "give one"),
    ("--squared-relu --openai-gelu", "--squared-relu and --openai-gelu exclude each other; give one"),
    ("--window-attn-skip-freq 2", "give both"), ("--window-size 3 -1", "0 or greater"),
    ("--position-embedding-type rope --rotary-percent 0.1", "give more"), ("--qkv-conv-kernel 4", "odd"),
    ("--norm-placement post --apply-residual-connection-post-layernorm", "leave one"),
    ("--muon-num-ns-steps 5", "about --optimizer muon and normuon, which is adam; leave one of the two out"),
    ("--optimizer muon --normuon-beta2 0.9", "about --optimizer normuon, which is muon"),
    ("--bf16 --initial-loss-scale 65536", "--initial-loss-scale 65536.0 is about --fp16, which is missing"),
    ("--bf16 --fp16-lm-cross-entropy", "is about --fp16"), ("--checkpoint-num-layers 2", "about --checkpoint-activa"),
    ("--save x --on-spike rewind --no-save-optim", "give one of the two"),
    ("--unet-skips --num-layers 1", "give more"), ("--norm-placement middle", "invalid choice")])
def test_what_cannot_be_is_refused_in_one_line_that_says_what_would_work(flags, remedy):
    with pytest.raises(ConfigError, match=remedy) as refusal:
        parse([*BASE, *flags.split()])
    assert "\n" not in str(refusal.value)


def test_widths_that_are_left_open_are_megatrons():
    assert parse(BASE)[0].model.ffn_hidden_size == 128
    assert parse([*BASE, "--swiglu", "--hidden-size", "768"])[0].model.ffn_hidden_size == 2048
    assert parse(BASE)[0].model.num_query_groups == 4
    assert ModelConfig().num_groups == ModelConfig().num_attention_heads


@pytest.mark.parametrize(("options", "on_gpus"), [
    ({}, "projection"), ({"position_embedding_type": "rope"}, "rotation"),
    ({"position_embedding_type": "rope", "qk_layernorm": True}, "projection"),
    ({"position_embedding_type": "rope", "value_embeddings": True}, "projection"),
    ({"position_embedding_type": "rope", "qkv_conv_kernel": 3}, "convolution")])
def test_the_kernel_behind_the_projection_sums_the_gradient_of_its_bias_on_gpus_alone(options, on_gpus):
    attention = Attention(replace(PROTEINLM, **options), 0, 32, ONE_RANK_STREAM)
    rotation = rotation_of(torch.arange(3), 8, 1e4) if options else None
    assert attention._sums_bias_gradient(torch.empty(3, device="meta"), rotation) == on_gpus
    assert attention._sums_bias_gradient(torch.empty(3), rotation) == "projection"
