"""The planner agrees with a dry run of the real training step."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.kernels.attention.fused import by_triton, by_varlen
from megatron.kernels.dropout import Dropout, Use
from megatron.model import transformer
from megatron.model.protein_model import ProteinModel
from megatron.parallel.layout import check_layout
from megatron.parallel.mesh import Axis
from megatron.parallel.parameters import Normal
from megatron.parallel.pipeline.partition import stages_of_rank
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.tensor.stream import Stream
from megatron.plan.dry_run import dry_run, measure
from megatron.plan.memory import peak_memory
from megatron.plan.memory_watch import MemoryWatch
from megatron.plan.messages import step_traffic
from megatron.plan.muon import muon_flops
from megatron.plan.pieces import _watched as watched_piece
from megatron.plan.pieces import measured as measured_piece
from megatron.plan.rank import Rank, padded_vocab_size
from megatron.plan.setting import BlockRange
from megatron.plan.step_time import bubble_micro_batches
from megatron.plan.work import WorkCounter
from tests.packed import packed_batch
from tests.tables import tried

TRAINING = ["--lr", "1e-4", "--train-iters", "1"]
# Activations are half and more of what these hold.
SMALL = [*TRAINING, "--num-layers", "2", "--hidden-size", "256", "--num-attention-heads", "4", "--seq-length", "1024",
         "--micro-batch-size", "2", "--global-batch-size", "8", "--bf16"]
FP32 = ["--no-bf16", "--attention-dropout", "0", "--hidden-dropout", "0"]
PUBLISHED = ["--preset", "proteinlm-200m", "--micro-batch-size", "1", "--global-batch-size", "8"]
TP2, PP2, CP2 = (["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2", "--num-layers", "4"],
                 ["--context-parallel-size", "2"])
SEQUENCE, FULL = ["--sequence-parallel"], ["--checkpoint-activations"]
INTERLEAVED, ZERO_BUBBLE = ["--num-layers-per-virtual-pipeline-stage", "1"], ["--pipeline-schedule", "zero-bubble"]


def sharding(what):
    return ["--data-parallel-sharding", what]


# Name: ranks, the rank that is looked at, flags.
LAYOUTS = {
    "one": (1, 0, []), "one-full": (1, 0, FULL), "one-fp32": (1, 0, FP32),
    "one-fp32-selective": (1, 0, [*FP32, "--recompute-granularity", "selective"]),
    "one-every-second-block": (1, 0, [*FULL, "--num-layers", "3", "--checkpoint-num-layers", "2"]),
    "one-micro-batch": (1, 0, ["--global-batch-size", "2"]), "one-fp32-stream": (1, 0, ["--fp32-residual-connection"]),
    "tp2": (2, 0, TP2), "tp2-sequence": (2, 1, [*TP2, *SEQUENCE]), "tp2-full-fp32": (2, 0, [*TP2, *FULL, *FP32]),
    "tp2-sequence-full": (2, 0, [*TP2, *SEQUENCE, *FULL]),
    "tp2-shared-activations": (2, 0, [*TP2, *FULL, "--distribute-checkpointed-activations"]),
    "dp2": (2, 0, []), "dp2-optimizer": (2, 0, sharding("optimizer")), "dp2-gradients": (2, 0, sharding("gradients")),
    "dp2-parameters": (2, 1, sharding("parameters")),
    "dp3-parameters": (3, 0, [*sharding("parameters"), "--global-batch-size", "12"]),
    "dp4-within-2": (4, 0, [*sharding("parameters"), "--shard-within", "2"]),
    "pp2": (2, 0, PP2), "pp2-last": (2, 1, PP2), "pp2-interleaved": (2, 0, [*PP2, *INTERLEAVED]),
    "pp2-no-blocks-first": (2, 0, [*PP2, "--decoder-first-pipeline-num-layers", "0"]),
    "pp2-zero-bubble": (2, 0, [*PP2, *ZERO_BUBBLE]), "pp2-zero-bubble-last": (2, 1, [*PP2, *ZERO_BUBBLE]),
    "pp2-dp2-parameters": (4, 0, [*PP2, *sharding("parameters")]), "cp2": (2, 0, CP2),
    "cp2-fp32": (2, 1, [*CP2, *FP32]), "cp2-full": (2, 0, [*CP2, *FULL]),
    "dp2-tp2": (4, 0, TP2), "cp2-tp2-sequence": (4, 3, [*CP2, *TP2, *SEQUENCE]),
    "dp2-tp2-optimizer": (4, 0, [*TP2, *SEQUENCE, *sharding("optimizer")]),
    "average": (1, 0, ["--ema", "0.99", "--cautious-weight-decay"]),
    "average-dp2-parameters": (2, 1, ["--ema", "0.99", *sharding("parameters")]),
}
FP8 = ["--bf16", "--fp8", "hybrid"]
IN_FP8 = {
    "fp8": (1, 0, FP8), "fp8-tp2-sequence": (2, 1, [*FP8, *TP2, *SEQUENCE]),
    "fp8-delayed-tp2-sequence": (2, 0, [*FP8, "--fp8-recipe", "delayed", *TP2, *SEQUENCE]),
    "fp8-delayed-dp2-optimizer": (2, 0, [*FP8, "--fp8-recipe", "delayed", *sharding("optimizer")]),
    "fp8-blocks-tp2-sequence": (2, 0, [*FP8, "--fp8-recipe", "mxfp8", *TP2, *SEQUENCE]),
    "fp8-dp2-parameters": (2, 1, [*FP8, *sharding("parameters")]),
    "fp8-pp2-zero-bubble": (2, 0, [*FP8, *PP2, *ZERO_BUBBLE]),
}
FOUR = ["--num-layers", "4"]
ESM2 = ["--position-embedding-type", "rope", "--token-dropout", "--no-bias-gelu-fusion", "--contact-head",
        "--attention-dropout", "0", "--hidden-dropout", "0"]
PROTBERT = ["--norm-placement", "post", "--embedding-layernorm", "--no-bias-gelu-fusion"]
SKIPS = ["--x0-skips", "--unet-skips"]
RECIPE = [*SKIPS, "--position-embedding-type", "rope", "--rotary-percent", "0.5", "--normalization", "RMSNorm",
          "--norm-placement", "both", "--qk-layernorm", "--swiglu", "--disable-bias-linear", "--num-attention-heads",
          "8", "--group-query-attention", "--num-query-groups", "4", "--untie-embeddings-and-output-weights",
          "--window-size", "64", "64", "--window-attn-skip-freq", "2", "--value-embeddings", "--qkv-conv-kernel", "3",
          "--final-logit-softcapping", "15", "--zero-init-output"]
FAMILIES = {
    "esm2": (1, 0, ESM2), "esm2-tp2-sequence": (2, 1, [*ESM2, *TP2, *SEQUENCE]), "esm2-cp2": (2, 0, [*ESM2, *CP2]),
    "esm2-dp2-parameters": (2, 1, [*ESM2, *sharding("parameters")]), "esm2-pp2": (2, 0, [*ESM2, *PP2]),
    "protbert-pp2": (2, 0, [*PROTBERT, *PP2]), "protbert-pp2-zero-bubble-last": (2, 1, [*PROTBERT, *PP2, *ZERO_BUBBLE]),
    "protbert-full": (1, 0, [*PROTBERT, *FULL]), "recipe": (1, 0, [*RECIPE, *FOUR]),
    "recipe-pp2-last": (2, 1, [*RECIPE, *PP2]), "recipe-tp2-sequence-full": (2, 1, [*RECIPE, *TP2, *SEQUENCE, *FULL]),
    "skips-pp4": (4, 2, [*SKIPS, "--num-layers", "8", "--pipeline-model-parallel-size", "4"]),
    "skips-pp2": (2, 0, [*SKIPS, *PP2]), "skips-pp2-zero-bubble-last": (2, 1, [*SKIPS, *PP2, *ZERO_BUBBLE]),
    "skips-dp2-gradients": (2, 0, [*SKIPS, *FOUR, *sharding("gradients")]),
    "unet-fp32-selective": (1, 0, ["--unet-skips", *FOUR, *FP32, "--recompute-granularity", "selective"]),
}
NO_CENTRE = ["--normalization", "RMSNorm"]
# Where the peak lies in a forward pass, or in the head: of what is sharded and gathered something else is there.
STREAM = [*PROTBERT, "--fp32-residual-connection", "--attention-dropout", "0", "--hidden-dropout", "0"]
PEAKS_ELSEWHERE = {
    "recipe-tp2-shared-activations": (2, 0, [*RECIPE, *FOUR, *TP2, *FULL, "--distribute-checkpointed-activations"]),
    "skips-tp2-shared-activations-every-second-block": (2, 1, [
        *SKIPS, "--num-layers", "8", *TP2, *FULL, "--distribute-checkpointed-activations", "--checkpoint-num-layers",
        "2"]),
    "protbert-fp32-stream": (1, 0, STREAM), "protbert-fp32-stream-pp2": (2, 0, [*STREAM, *PP2]),
    "protbert-fp32-stream-dp2-parameters": (2, 0, [*STREAM, *sharding("parameters")]),
    "protbert-fp32-stream-dp2-one-micro-batch": (2, 0, [*STREAM, *sharding("gradients"), "--global-batch-size", "4"]),
    "rms-dp2-parameters": (2, 0, [*NO_CENTRE, *sharding("parameters")]),
    "one-block-dp2-parameters-full": (2, 1, [*sharding("parameters"), *FULL, "--num-layers", "1"]),
}
AT_SCALE = {"published-pp2-first": (2, 0, PP2), "published-dp8-gradients-full": (8, 0, [*sharding("gradients"), *FULL])}


ALL = {**LAYOUTS, **IN_FP8, **FAMILIES, **PEAKS_ELSEWHERE, **AT_SCALE}
# Of every kind of split, recomputation, schedule, precision and family one.
EACH_TIME = {"one-fp32-selective", "tp2-sequence-full", "tp2-shared-activations", "dp2-optimizer", "dp4-within-2",
             "pp2-interleaved", "pp2-zero-bubble-last", "fp8-delayed-dp2-optimizer", "esm2-cp2", "recipe-pp2-last",
             "protbert-fp32-stream-dp2-parameters"}
NAMES = tried(ALL, EACH_TIME)
STATES = [(1, ()), (4, (*TP2, *sharding("parameters"))), (2, tuple(PP2)),
          (8, (*TP2, *CP2, *sharding("optimizer"), "--shard-within", "2"))]


@cache
def both(name):
    """What the dry run of a layout measures, and the planner's rank."""
    num_ranks, number, flags = ALL[name]
    base = PUBLISHED if name in AT_SCALE else SMALL
    config, _ = parse([*base, "--dry-run-ranks", str(num_ranks), "--dry-run-rank", str(number), *flags])
    check_layout(config, num_ranks)
    return measure(config), Rank(config, num_ranks, number)


def by_group(counts):
    """Counts by operation and axis, where data and context, which are one group in a layout of two ranks, are one."""
    merged = {}
    for (axis, operation), count in counts.items():
        key = "data or context" if "data" in axis or "context" in axis else axis, operation
        merged[key] = merged.get(key, 0) + count
    return {key: count for key, count in merged.items() if count}


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_within_1_1_percent_of_the_dry_runs(name):
    measured, rank = both(name)
    planned = peak_memory(rank)
    assert planned.peak == pytest.approx(measured.memory.peak, rel=0.011)
    assert (planned.parameters, planned.optimizer) == (measured.memory.parameters, measured.memory.optimizer)


@pytest.mark.parametrize("optimizer", tried(["muon", "normuon", "sgd"], ["normuon"]))
@pytest.mark.parametrize(("num_ranks", "layout"), tried(STATES, STATES[-1:]))
def test_it_knows_the_state_of_every_optimizer_and_what_it_sends(num_ranks, layout, optimizer):
    number = num_ranks // 2
    config, _ = parse([*SMALL, "--dry-run-ranks", str(num_ranks), "--dry-run-rank", str(number), *layout, "--optimizer",
                       optimizer])
    measured, rank = measure(config), Rank(config, num_ranks, number)
    planned, sent = peak_memory(rank), step_traffic(rank)
    assert planned.optimizer == measured.memory.optimizer > 0
    assert planned.peak == pytest.approx(measured.memory.peak, rel=0.011)
    assert by_group(sent.sent) == by_group(measured.traffic.sent)
    assert by_group(sent.calls) == by_group(measured.traffic.calls)
    assert (muon_flops(rank) > 0) == (optimizer != "sgd")


@pytest.mark.parametrize(("num_ranks", "layout", "optimizer"), tried(
    [(1, (), "muon"), (2, (), "normuon"), (2, TP2, "muon"), (2, sharding("optimizer"), "muon"),
     (4, (*TP2, *sharding("parameters")), "normuon"), (2, ("--swiglu", *PP2), "muon")],
    [(1, (), "muon"), (4, (*TP2, *sharding("parameters")), "normuon")]))
def test_it_knows_what_muon_takes_where_activations_are_small(num_ranks, layout, optimizer):
    config, _ = parse([*SMALL, "--seq-length", "128", "--micro-batch-size", "1", "--dry-run-ranks", str(num_ranks),
                       "--optimizer", optimizer, *layout])
    assert peak_memory(Rank(config, num_ranks)).peak == pytest.approx(measure(config).memory.peak, rel=0.011)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_sends_exactly_what_the_dry_run_counts(name):
    measured, rank = both(name)
    planned = step_traffic(rank)
    assert by_group(planned.sent) == by_group(measured.traffic.sent)
    assert by_group(planned.calls) == by_group(measured.traffic.calls)


@pytest.mark.parametrize("flags", [[], ["--make-vocab-size-divisible-by", "8", "--ffn-hidden-size", "320"],
                                   ["--kv-channels", "24"]])
@pytest.mark.parametrize(("layout", "number"), [([], 0), ([*TP2, *SEQUENCE], 1), ([*PP2, *TP2], 0), ([*PP2, *TP2], 3)])
def test_a_rank_holds_the_parameters_of_the_real_model(layout, number, flags):
    config, _ = parse([*SMALL, *layout, *flags])
    num_ranks = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    rank = Rank(config, num_ranks, number)
    stream = Stream(Axis(rank.place["tensor"], rank.sizes["tensor"]), config.parallel.sequence_parallel)
    stages = stages_of_rank(config.model.num_layers, config.parallel, rank.place["pipeline"])
    for stage, planned in zip(stages, rank.stages, strict=True):
        with torch.device("meta"):
            model = ProteinModel(config.model, config.precision, padded_vocab_size(config), stream, stage)
        assert [tuple(p.shape) for p in model.parameters()] == [p.shape for p in planned.held]


class BlockWithMore(transformer.Block):
    """A block with an option that the planner has never heard of: one more split layer, and a norm of its own."""

    def __init__(self, config, number, num_ids, dtype, stream):
        super().__init__(config, number, num_ids, dtype, stream)
        self.gate = ColumnParallelLinear(config.hidden_size, 3 * config.hidden_size, stream, Normal(0.02))
        self.back = RowParallelLinear(3 * config.hidden_size, config.hidden_size, stream, Normal(0.02))

    def forward(self, hidden_uh, sequence, *beside):
        hidden_uh = super().forward(hidden_uh, sequence, *beside)
        more_uh = self.back(torch.sigmoid(self.gate(hidden_uh.to(self.dtype))))
        return hidden_uh + torch.nn.functional.rms_norm(more_uh, more_uh.shape[-1:])


@pytest.mark.parametrize("name", tried(["one", "one-full", "tp2-sequence"], ["tp2-sequence"]))
def test_the_planner_follows_an_option_that_it_does_not_know(monkeypatch, name):
    num_ranks, _, flags = LAYOUTS[name]
    config, _ = parse([*SMALL, "--num-layers", "3", "--dry-run-ranks", str(num_ranks), *flags])
    before = peak_memory(Rank(config, num_ranks))
    monkeypatch.setattr(transformer, "Block", BlockWithMore)
    # What was measured of the model as it is does not hold for another.
    other = replace(config, model=replace(config.model, init_method_std=0.03))
    measured, planned = measure(other), peak_memory(Rank(other, num_ranks))
    assert planned.peak == pytest.approx(measured.memory.peak, rel=0.011)
    assert (planned.parameters, planned.optimizer) == (measured.memory.parameters, measured.memory.optimizer)
    assert planned.parameters > 1.3 * before.parameters
    sent = step_traffic(Rank(other, num_ranks)).sent
    assert {key: sent[key] for key in sent if key[0] == "tensor"} == {
        key: count for key, count in by_group(measured.traffic.sent).items() if key[0] == "tensor"}


def test_more_sharding_holds_less():
    def peak(what):
        config, _ = parse(["--preset", "proteinlm-3b", "--global-batch-size", "1024", *sharding(what)])
        return peak_memory(Rank(config, 64)).peak

    peaks = [peak(what) for what in ("none", "optimizer", "gradients", "parameters")]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(("rate", "queries", "first", "pairs", "products"), [
    (0.0, 1, None, 25 + 16 + 9, 7),  # FlashAttention, for which filler is a protein
    (0.1, 1, None, 25 + 16, 9), (0.1, 3, None, 25 + 16, 9), (0.1, 1, 6, 3 * 4, 9)])
def test_attention_counts_the_pairs_that_see_each_other(rate, queries, first, pairs, products):
    sequence, work = packed_batch(5, 4, filler=3, empty=2).sequence, WorkCounter()
    with MemoryWatch([work.count]):
        qkv = torch.empty(12, 2, queries + 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        query, keys = (qkv, None) if first is None else (qkv[first:, :, :-2], qkv[:, :, -2:])
        dropout = Dropout(rate, torch.tensor(1), Use.PROBABILITIES) if rate else None
        context = (by_triton if dropout else by_varlen)(query, sequence, dropout, None, keys, first or 0)
        context.backward(torch.empty_like(context))
    assert work.flops == 2 * products * pairs * 2 * queries * 8


@pytest.mark.parametrize("num_rows", [4, 16])
@pytest.mark.parametrize("part", [BlockRange(True, range(0), False), BlockRange(False, range(1), False),
                                  BlockRange(False, range(0), True)])
def test_many_rows_are_on_the_line_through_one_and_two(part, num_rows):
    config, _ = parse([*SMALL, *TP2, *SEQUENCE, "--micro-batch-size", str(num_rows), "--global-batch-size", "16"])
    setting = Rank(config, 2, 1).setting
    planned, watched = measured_piece(setting, part, False), watched_piece(setting, part, False)
    assert (planned.in_forward, planned.in_backward) == (watched.in_forward, watched.in_backward)
    assert (planned.kept, planned.end, planned.flops) == (watched.kept, watched.end, watched.flops)
    assert (planned.traffic.sent, planned.traffic.calls) == (watched.traffic.sent, watched.traffic.calls)
    assert planned.moved == pytest.approx(watched.moved, rel=1e-6)  # the filler's segments are rounded


def test_bubbles_are_those_of_the_papers():
    def idle(*flags):
        config, _ = parse([*SMALL, "--pipeline-model-parallel-size", "4", "--num-layers", "16", *flags])
        return bubble_micro_batches(Rank(config, 4))

    assert (idle(), idle("--num-layers-per-virtual-pipeline-stage", "2"), idle(*ZERO_BUBBLE)) == (3, 1.5, 1)


def test_a_dry_run_of_16384_ranks_reports_one_of_them():
    flags = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4", "--global-batch-size", "8192",
             "--dry-run-ranks", "16384", "--dry-run-rank", "16383"]
    report = dry_run(parse([*SMALL, *flags])[0])
    assert "rank 16383 of 16384" in report
    assert {"parameters", "gradients", "optimizer", "peak", "data", "pipeline", "tensor"} <= set(report.split())


def test_a_dry_run_counts_a_long_step_as_it_would_a_short_one():
    def sent(rows):
        config, _ = parse([*SMALL, *PP2, "--num-layers", "2", "--global-batch-size", str(rows), "--dry-run-ranks", "2"])
        return measure(config).traffic.sent["pipeline", "send"]

    assert sent(400) == 100 * sent(4)


# Each product reads the weight, forward and backward, and its gradient is read and written: 12 bytes in bf16,
# 16 in fp32; tables are read by rows and cost a little more. Full recomputation reads it once more. Sharded
# gradients are new in bf16 and go on from there flat, which is not counted; "optimizer" casts the first to fp32 (6) and
# adds the next in bf16 (2 and 10), or since PyTorch 2.15 in the product itself (8).
_ADDED = 18 if torch.__version__ >= "2.15" else 22


@pytest.mark.parametrize(("flags", "least", "most"), [
    ([], 12, 12.5), (FULL, 14, 14.5), (["--no-bf16", *FULL], 20, 20.5),
    (["--dry-run-ranks", "2", *sharding("gradients")], 8, 9),
    (["--dry-run-ranks", "2", *sharding("parameters")], 8, 9),
    (["--dry-run-ranks", "2", *sharding("optimizer")], _ADDED, _ADDED + 0.6)])
def test_a_further_micro_batch_moves_these_bytes_of_each_weight(flags, least, most):
    config, _ = parse([*SMALL, "--global-batch-size", "8", "--max-position-embeddings", "2048", *flags])
    assert least <= measure(config).weight_bytes <= most


def test_a_dry_run_of_a_model_as_wide_as_a_micro_batch_is_long_tells_no_bytes_of_weights():
    config, _ = parse([*SMALL, "--seq-length", "256", "--micro-batch-size", "1"])
    assert measure(config).weight_bytes is None
    assert "bytes a parameter" not in dry_run(config)


@pytest.mark.parametrize(("dropout", "of_pair"), [(0.0, 4 + 10), (0.1, 4 + 14)])  # PyTorch's operator, and ours
@pytest.mark.parametrize("window", [(0, 0), (3, 5), (200, 1), (1000, 1000)])
def test_attention_under_a_window_works_on_the_pairs_that_see_each_other(window, dropout, of_pair):
    def flops(*flags):
        config, _ = parse([*SMALL, "--bf16", "--attention-dropout", str(dropout), *flags])
        setting = Rank(config, 1).setting
        piece = measured_piece(setting, BlockRange(False, range(1), False), False)
        return piece.flops, setting.batch.sequence.cu_seqlens

    def pairs(ends, left, right):
        places = [torch.arange(length) for length in ends.diff().tolist()]
        return sum(int(((place - place[:, None]) >= -left).logical_and((place - place[:, None]) <= right).sum())
                   for place in places)

    whole, ends = flops()
    inside, _ = flops("--window-size", *map(str, window))
    left_out = pairs(ends, 10**6, 10**6) - pairs(ends, *window)
    assert whole - inside == of_pair * left_out * 256


def test_a_dry_run_of_a_rank_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--dry-run-rank is 2, and --dry-run-ranks 2"):
        dry_run(parse([*SMALL, "--dry-run-ranks", "2", "--dry-run-rank", "2"])[0])
