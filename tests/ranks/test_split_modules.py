"""Each module split over the tensor axis agrees with its twin on one rank; both run in one process."""

import itertools
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch

from megatron.config import PrecisionConfig
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.kernels.pointwise.product import whole as whole_product
from megatron.kernels.rotary import rotation_of
from megatron.model.attention import Attention
from megatron.model.embedding import Embedding
from megatron.model.feed_forward import feed_forward
from megatron.model.protein_model import ProteinModel
from megatron.model.transformer import Block
from megatron.parallel.data.replicated import DataParallel
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import BIAS, Normal, matrix
from megatron.parallel.placement import Placement, gradient_norm, placement_of
from megatron.parallel.randomness import seed_for
from megatron.parallel.tensor import layers, vocabulary
from megatron.parallel.tensor.layers import ColumnParallelLinear, Matrix, RowParallelLinear
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.parallel.tensor.vocabulary import vocabulary_loss, vocabulary_parameter
from tests.families import FAMILIES, MASK_ID
from tests.packed import packed_batch
from tests.ranks.launch import run_ranks
from tests.tables import tried
from tests.wholes import assembled, wholes

CONFIGS = {name: replace(config, num_layers=2) for name, config in FAMILIES.items()}
CONFIG = CONFIGS["proteinlm"]
VOCABULARY, TOKENS = 32, 24
INITIAL = Normal(0.02)
LENGTHS = (7, 1, 12, 4)
# Relative to the norm of the tensor. In bf16 each of the few roundings is 2**-9, and sums over ranks add their own.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
DROPOUT = (0.0, 0.2)


def fill(module):
    """Random values by name, of which a split module gets its part."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(seed_for(1, name))
            whole = torch.randn(placement_of(parameter).whole_shape(parameter), generator=generator) * 0.3
            parameter.copy_(placement_of(parameter).cut(whole, parameter))
    return module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(module):
    """The wholes of all gradients of a module, with those summed that each rank has a part of."""
    DataParallel([module], Mesh()).reduce_gradients()
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return wholes({name: parameter.grad for name, parameter in named.items()}, named)


def on_stream(stream):
    return Placement(stream.axis, 0, TOKENS) if stream.is_split else Placement()


def layer_outcome(stream, kind, dtype, config):
    """Output, input gradient and parameter gradients of one layer, as wholes."""
    width = config.hidden_size
    layer, before, after = {
        "column": lambda: (ColumnParallelLinear(width, 48, stream, INITIAL), on_stream(stream),
                           Placement(stream.axis, 1, 48)),
        "row": lambda: (RowParallelLinear(width, 48, stream, INITIAL), Placement(stream.axis, 1, width),
                        on_stream(stream)),
        "attention": lambda: (Attention(config, 0, VOCABULARY, stream), on_stream(stream), on_stream(stream)),
        "feed-forward": lambda: (feed_forward(config, stream), on_stream(stream), on_stream(stream)),
        "block": lambda: (Block(config, 0, VOCABULARY, dtype, stream), on_stream(stream), on_stream(stream)),
    }[kind.removesuffix(" apart")]()
    fill(layer)
    whole = normal(TOKENS, width).to(dtype)
    local = whole[:, :width // stream.axis.size] if before.dim == 1 else whole[:len(stream.tokens(whole))]
    x = before.cut(whole, local).clone().requires_grad_()
    if "apart" in kind:
        with patch.object(layers, "takes_triton", lambda _: True):
            y = whole_product(layer.product(x))
    else:
        y = layer(x, *beside_the_stream(config, x, kind)) if kind in ("attention", "block") else layer(x)
    if kind in ("attention", "feed-forward"):
        y = whole_product(y)
    out_gradient = normal(TOKENS, 48 if "column" in kind or "row" in kind else width, seed=1).to(dtype)
    y.backward(after.cut(out_gradient, y))
    return {**assembled({"output": after.part(y), "input gradient": before.part(x.grad)}), **gradients(layer)}


def beside_the_stream(config, x, kind):
    """What attention and blocks take beside hidden states."""
    sequence = packed_batch(*LENGTHS).sequence
    is_rotary = config.position_embedding_type == "rope"
    rotation = rotation_of(sequence.positions_t, config.kv_channels, 10000.0) if is_rotary else None
    return sequence, rotation, *([x.detach() * 0.5] if kind == "block" and config.x0_skips else [])


def embedding_outcome(stream, dtype, config):
    embedding = fill(Embedding(config, VOCABULARY, dtype, stream, mask_id=MASK_ID))
    y = embedding(packed_batch(*LENGTHS).sequence)
    y.backward(on_stream(stream).cut(normal(TOKENS, config.hidden_size).to(dtype), y))
    return {**assembled({"output": on_stream(stream).part(y)}), **gradients(embedding)}


@cache
def twin(outcome, *arguments):
    """What `outcome` gives on one rank: the same beside every layout. All ranks ask for it together."""
    return outcome(ONE_RANK_STREAM, *arguments)


def with_twin(axis, is_split, outcome, *arguments):
    return [outcome(Stream(axis, is_split), *arguments), twin(outcome, *arguments)]


def layers_and_twins(axis, is_split, dtype):
    pairs = {kind: with_twin(axis, is_split, layer_outcome, kind, dtype, CONFIG)
             for kind in ("column", "row", "column apart", "row apart")}
    for family, config in CONFIGS.items():
        for kind in ("attention", "feed-forward", "block"):
            pairs[family, kind] = with_twin(axis, is_split, layer_outcome, kind, dtype, config)
        pairs[family, "embedding"] = with_twin(axis, is_split, embedding_outcome, dtype, config)
    return pairs


def assert_same(results, tolerance):
    """Each rank's pairs of (ours, twin), by name: equal within `tolerance` of the twin's norm."""
    for case, (ours, twin) in itertools.chain.from_iterable(pairs.items() for pairs in results):
        assert ours.keys() == twin.keys()
        for name, expected in twin.items():
            assert ours[name].shape == expected.shape, (case, name)
            error, norm = (ours[name].double() - expected.double()).norm(), expected.double().norm()
            of_scalars = 10 if expected.numel() < 3 else 1  # sums of many numbers of both signs
            assert error <= of_scalars * tolerance * norm + 1e-7, f"{case}, {name}: off by {error}, its norm is {norm}"


def head_outcome(axis, target_ids, multiple, dtype, softcap=None):
    module, target_ids = Matrix(), torch.tensor(target_ids, dtype=torch.int64)
    module.weight = vocabulary_parameter((VOCABULARY, 16), multiple, axis, matrix(INITIAL))
    module.bias = vocabulary_parameter((VOCABULARY,), multiple, axis, BIAS)
    fill(module)
    hidden = normal(len(target_ids), 16).to(dtype).requires_grad_()
    loss, num_correct = vocabulary_loss(hidden, module, module.bias, target_ids, VOCABULARY, axis, softcap)
    (3 * loss).backward()
    return {"loss": loss.detach(), "correct": num_correct, "input gradient": hidden.grad, **gradients(module)}


def heads_and_twins(axis, dtype):
    """For rows on each rank a multiple of 8: a share for each of 4; of 24: 24 and 8; of 32: all on the first."""
    targets = {"every shard": range(VOCABULARY), "the first": [3, 3, 5], "the last": [31], "none": [],
               "some, then padding": [31, 8, 0, *[NO_TARGET] * 4], "padding": [NO_TARGET] * 3}
    twins = {place: head_outcome(Axis(), ids, VOCABULARY, dtype) for place, ids in targets.items()}
    pairs = {f"targets on {place}, rows by {multiple}": [head_outcome(axis, ids, multiple, dtype), twins[place]]
             for place, ids in targets.items() for multiple in (8, 24, 32)}
    ids = [*range(VOCABULARY), NO_TARGET, 7]
    whole = head_outcome(Axis(), ids, VOCABULARY, dtype, 0.7)
    pairs["with a softcap"] = [head_outcome(axis, ids, 24, dtype, 0.7), whole]
    with patch.object(vocabulary, "_CHUNK", 5):
        pairs["in chunks"] = [head_outcome(axis, ids, 24, dtype, 0.7), whole]
    return pairs


def likeliest_counts(axis):
    logits = torch.tensor([[0., 5., 5., 1.], [2., 0., 0., 2.], [0., 0., 0., 9.], [1., 1., 1., 1.]])
    rows = Matrix()
    rows.weight = torch.nn.Parameter(torch.eye(4).chunk(axis.size)[axis.rank])
    return [vocabulary_loss(logits, rows, torch.zeros(4 // axis.size), torch.tensor(ids), 4, axis)[1].item()
            for ids in ([1, 0, 3, 0], [2, 3, 3, 1], [0, 0, 0, 0], [NO_TARGET, 0, NO_TARGET, 0], [NO_TARGET] * 4)]


def model_outcome(stream, case, precision, config=CONFIG):
    model = fill(ProteinModel(config, precision, VOCABULARY, stream, mask_id=MASK_ID))
    batch = packed_batch(*BATCHES[case][0], **BATCHES[case][1])
    loss, num_correct = model(batch.sequence, batch.targets)
    loss.backward()
    return {"loss": loss.detach(), "correct": num_correct, **gradients(model),
            "norm": gradient_norm(model.parameters())}


# Proteins' lengths, and the filler, padding and targets beside them; in all a multiple of 4 tokens.
BATCHES = {
    "full": ((7, 1, 12, 4), {}),
    "with filler and padding": ((7, 1, 12, 4), {"filler": 4, "empty": 2, "padding": 3}),
    "a rank has filler alone": ((1,), {"filler": 7, "targets": [0]}),
    "no target": ((9,), {"filler": 3, "targets": [], "padding": 2}),
    "filler alone": ((), {"filler": 8, "padding": 2}),
}


def models_and_twins(axis, is_split, precision):
    return {case: with_twin(axis, is_split, model_outcome, case, precision) for case in BATCHES}


def families_and_twins(axis, is_split):
    return {family: with_twin(axis, is_split, model_outcome, "with filler and padding", PrecisionConfig(), config)
            for family, config in CONFIGS.items()}


def recomputed_models(axis, is_split, dropout):
    """The outcome with dropout: as it is, recomputed, and recomputed from shares of the activations."""
    config = replace(CONFIG, attention_dropout=dropout, hidden_dropout=dropout)
    recomputing = replace(config, checkpoint_activations=True)
    outcomes = []
    for each in (config, recomputing, replace(recomputing, distribute_checkpointed_activations=True)):
        torch.manual_seed(9)
        outcomes.append(model_outcome(Stream(axis, is_split), "with filler and padding", PrecisionConfig(), each))
    return outcomes[:2] if is_split else outcomes


def on_one_rank_of_many(axis):
    """All that the tests below ask about, in one launch of the ranks."""
    both = (False, True)
    twin.cache_clear()  # processes stay, and on some there may be answers that others have not
    return {
        "layers": {(split, dtype): layers_and_twins(axis, split, dtype) for split in both for dtype in TOLERANCE},
        "heads": {dtype: heads_and_twins(axis, dtype) for dtype in TOLERANCE},
        "likeliest": likeliest_counts(axis),
        "models": {(split, bf16): models_and_twins(axis, split, PrecisionConfig(bf16=bf16))
                   for split in both for bf16 in both},
        "families": {split: families_and_twins(axis, split) for split in both},
        "recomputed": {(split, rate): recomputed_models(axis, split, rate) for split in both for rate in DROPOUT}}


@pytest.fixture(scope="module", params=tried([2, 4], [2]))
def results(request):
    return run_ranks(on_one_rank_of_many, request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_split", [False, True])
def test_split_layers_equal_their_one_rank_twins(results, is_split, dtype):
    assert_same((rank["layers"][is_split, dtype] for rank in results), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_split_heads_loss_equals_its_twins_wherever_the_targets_lie(results, dtype):
    assert_same((rank["heads"][dtype] for rank in results), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padded_targets_have_no_part_in_the_heads_loss_and_gradients(dtype):
    tight, padded = (head_outcome(Axis(), ids, 8, dtype) for ids in ([31, 8, 0], [31, 8, 0, NO_TARGET, NO_TARGET]))
    assert not padded["input gradient"][3:].any()
    padded["input gradient"] = padded["input gradient"][:3]
    assert_same([{"head": (padded, tight)}], 1e-6)


def test_of_equal_logits_the_first_is_the_likeliest_as_on_one_rank_and_padding_never_is(results):
    assert likeliest_counts(Axis()) == [4, 1, 2, 2, 0]
    assert [rank["likeliest"] for rank in results] == [[4, 1, 2, 2, 0]] * len(results)


@pytest.mark.parametrize("is_split", [False, True])
def test_the_split_models_loss_and_gradients_are_those_of_one_rank_also_with_filler(results, is_split):
    every = [rank["models"][is_split, False] for rank in results]
    assert_same(every, 1e-5)
    # Filler and padding change nothing on any number of ranks.
    assert_same([{"filler": (pairs["with filler and padding"][0], pairs["full"][0])} for pairs in every], 1e-6)
    # What every rank holds has the same gradient on each to the last bit: else the ranks would drift apart.
    for other, (case, (first, _)) in itertools.product(every, every[0].items()):
        assert all(torch.equal(other[case][0][name], gradient) for name, gradient in first.items()), case


@pytest.mark.parametrize("is_split", [False, True])
def test_the_loss_and_gradients_of_every_kind_of_model_are_those_of_one_rank(results, is_split):
    assert_same((rank["families"][is_split] for rank in results), 1e-5)


@pytest.mark.parametrize("is_split", [False, True])
def test_the_split_model_in_bf16_is_as_near_to_fp32_as_one_rank_is(results, is_split):
    exact = model_outcome(ONE_RANK_STREAM, "full", PrecisionConfig())
    for rank in results:
        ours, twins = (distance(outcome, exact) for outcome in rank["models"][is_split, True]["full"])
        assert ours < 1.5 * twins


def distance(outcome, exact):
    named = [name for name in exact if name.endswith(("weight", "bias"))]
    return torch.cat([(outcome[name] - exact[name]).flatten() for name in named]).norm()


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("is_split", [False, True])
def test_recomputation_changes_no_bit_of_a_split_model(results, is_split, dropout):
    for rank in results:
        first, *others = rank["recomputed"][is_split, dropout]
        for other in others:
            assert all(torch.equal(other[name], first[name]) for name in first)
