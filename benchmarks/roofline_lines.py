"""Lists the kernels of a training step with their bytes and FLOPs, as lines of `benchmarks/roofline.py`'s tables.

Everything is counted on tensors without values (`benchmarks/launched.py`), for 16 packed rows of 1,024 tokens of the
shipped proteins. A line is one kernel with all its launches in a pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.compiled import ATTENTION, PRODUCTS, Launches, Other, RecordedLaunch
from benchmarks.launched import launch_of_map, launches_around_blocks, launches_of_block, launches_of_update
from benchmarks.proteins import shipped_rows
from megatron.config import Config
from megatron.config.command_line import parse
from megatron.data.batches.batch import Batch
from megatron.model.protein_model import compute_dtype

NUM_ROWS, SEQ_LENGTH = 16, 1024
OTHERS, MUON = "PyTorch's ", "Muon: "
# Flags of other variants, by the prefix of their lines: they launch kernels that the model itself does not.
INSTEAD = {
    "": ("--hidden-dropout 0.1 --attention-dropout 0.1 --bias-gelu-fusion",
         "--normalization RMSNorm --swiglu --qk-layernorm --disable-bias-linear",
         "--qkv-conv-kernel 5", "--squared-relu"),
    "FP8, tensorwise or delayed: ": ("--fp8 hybrid",),
    "FP8, rowwise: ": ("--fp8 hybrid --fp8-recipe rowwise",),
    "FP8, mxfp8: ": ("--fp8 hybrid --fp8-recipe mxfp8",),
}
_ATTENDS = {"_varlen_attn": "PyTorch's varlen_attn", "fused_attention": "Triton's kernels, FlexAttention"}
_MODULES = {"_varlen_attn": ("attention.fused",), "fused_attention": ("attention.triton_kernels", "attention.flex"),
            "fp8_largest": ("fp8",), "fp8_quantised": ("fp8",)}
_UPDATES = {"_fused_adamw_": "AdamW", "linalg_vector_norm": "norm of gradients", "_foreach_copy_": "copies of weights",
            "muon_mix": "momentum", "muon_advance": "decay and step"}
_TRANSPOSES = ("clone", "constant_pad_nd", "_unsafe_view", "copy_")


@dataclass(frozen=True)
class Line:
    """A kernel's launches in a pass (`side`): "forward", "backward" or "update"."""

    kernel: str
    side: str
    launches: list[RecordedLaunch | Other]

    @property
    def num_bytes(self) -> int:
        """The bytes that all launches move through memory."""
        return sum(launch.num_bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """The FLOPs of all launches."""
        return sum(launch.flops for launch in self.launches)

    @property
    def modules(self) -> set[str]:
        """The modules of `megatron.kernels` that contain these kernels."""
        return {module for launch in self.launches for module in (
            (launch.module,) if isinstance(launch, RecordedLaunch) else _MODULES.get(
                launch.name.removesuffix("_backward"), ()))}


@dataclass(frozen=True)
class Step:
    """The lines of a model's training step: of one block, around the blocks, of the update."""

    config: Config
    batch: Batch
    block: list[Line]
    around: list[Line]
    update: list[Line]


def config_of(flags: str) -> Config:
    """The configuration of the flags, with the micro-batch size and row length that are counted."""
    return parse([*flags.split(), "--seq-length", str(SEQ_LENGTH), "--micro-batch-size", str(NUM_ROWS)])[0]


def step_of(flags: str) -> Step:
    """The step of a model with these flags."""
    config = config_of(flags)
    batch = shipped_rows(config.data, NUM_ROWS)
    return Step(config, batch, lines_of(launches_of_block(config, batch=batch)),
                lines_of(launches_around_blocks(config, batch)), lines_of([launches_of_update(config)]))


def lines_instead(flags: str, known: Iterable[Line]) -> list[Line]:
    """The lines of kernels that other flags bring and `known` lacks: of a block, FP8 weights, attention maps, Muon."""
    found = {(line.kernel, line.side): line for line in known}
    num_known = len(found)
    for prefix, others in INSTEAD.items():
        for other in others:
            config = config_of(f"{flags} {other}")
            lines = lines_of(launches_of_block(config, batch=shipped_rows(config.data, NUM_ROWS)), prefix)
            for line in (*lines, *([_weights_of(config, prefix)] if prefix else [])):
                if not line.kernel.startswith(OTHERS):
                    found.setdefault((line.kernel, line.side), line)
    muon = lines_of([launches_of_update(config_of(f"{flags} --optimizer muon"))], MUON)
    return [*list(found.values())[num_known:], maps_of(config_of(flags)), *muon]


def _weights_of(config: Config, prefix: str) -> Line:
    """The line of converting all weights to FP8, for both directions, which happens once an update."""
    lines = lines_of([launches_of_update(config)], prefix)
    return Line(f"{prefix}weights of all blocks", "update", [
        launch for line in lines if line.kernel.startswith(prefix) for launch in line.launches])


def maps_of(config: Config) -> Line:
    """The line of the attention maps of every protein of the micro-batch, in one block."""
    ends = shipped_rows(config.data, NUM_ROWS).sequence.cu_seqlens.unique().tolist()
    model, dtype = config.model, compute_dtype(config.precision)
    queries = model.num_attention_heads // model.num_groups
    lengths = [stop - start for start, stop in pairwise(ends)]
    return Line("attention maps (contacts)", "forward", [
        launch_of_map(dtype, model.kv_channels, length, length, model.num_groups, queries) for length in lengths])


def lines_of(passes: Sequence[Launches], prefix: str = "") -> list[Line]:
    """The lines of a forward and a backward pass, or of an update, in the order in which kernels first run."""
    sides = ("forward", "backward") if len(passes) == 2 else ("update",)
    lines: list[Line] = []
    for side, launches in zip(sides, passes, strict=True):
        found: dict[str, list[RecordedLaunch | Other]] = {}
        in_order: list[RecordedLaunch | Other] = [*launches.triton, *launches.others]
        for launch in in_order:
            found.setdefault(_label(launch, prefix), []).append(launch)
        rest = found.pop("", [])
        lines += [Line(kernel, side, launches) for kernel, launches in found.items()]
        if rest:
            lines.append(Line(f"{prefix * (prefix == MUON)}{OTHERS}{_names(rest)}", side, rest))
    return lines


def _label(launch: RecordedLaunch | Other, prefix: str) -> str:
    """What a kernel does, in words; empty for PyTorch's kernels that have no line of their own."""
    if isinstance(launch, RecordedLaunch):
        return _label_of_triton(launch, prefix)
    name, is_fp8 = launch.name, prefix.startswith("FP8")
    if name in PRODUCTS:
        return f"{'FP8: ' if launch.units == 'fp8' else prefix if name == 'baddbmm' else ''}matrix products"
    if name in ATTENTION:
        return f"attention ({_ATTENDS[name.removesuffix('_backward')]})"
    if name.startswith("fp8"):
        return prefix + {"fp8_largest": "largest magnitudes", "fp8_quantised": "scaled and cast"}[name]
    if is_fp8 and name in _TRANSPOSES:
        return f"{prefix}copies, transposed"
    return prefix * (prefix == MUON) + _UPDATES[name] if name in _UPDATES else ""


def _label_of_triton(launch: RecordedLaunch, prefix: str) -> str:
    """What one of our Triton kernels does, in words."""
    kernel, has = launch.name.split()[0], launch.constants
    if kernel == "residual_norm":
        joins = has.get("HAS_BRANCH") or has["HAS_SHIFT"] or has["HAS_DROPOUT"]
        norm = "LayerNorm" if has["HAS_MEAN"] else "RMSNorm"
        join = "bias, " * has["HAS_SHIFT"] + "dropout, " * has["HAS_DROPOUT"] + "residual"
        return " and ".join([join] * bool(joins) + [norm] * has["HAS_NORM"])
    if kernel == "activation":
        return f"{'bias and ' * has['HAS_BIAS']}{has['KIND']}"
    if kernel == "heads":
        norms = has.get("HAS_NORM", "turn_back" not in launch.name)
        return " and ".join(["norm of queries and keys"] * norms + ["rotary"] * bool(has["HALF"]))
    if kernel == "symmetric":
        return f"{prefix}{'a A + b A²' if has['HAS_FACTOR'] else 'X Xᵀ'}, half"
    return kernel.replace("_", " ")


def _names(others: Sequence[RecordedLaunch | Other]) -> str:
    """The names of up to four operators that move most of the bytes."""
    sizes: dict[str, int] = {}
    for other in others:
        sizes[other.name] = sizes.get(other.name, 0) + other.num_bytes
    most = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return ", ".join(name.strip("_") for name in most if sizes[name] > 0.02 * sum(sizes.values()))
