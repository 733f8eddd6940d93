"""Computes a roofline without a GPU: `python benchmarks/roofline.py [--models 133M 650M 3B] [--registers 80 90 100]`.

Nothing is measured. The tables list each kernel of a training step of ESM-2 (of one block, around the blocks, of the
update) and those that other flags bring, with the bytes that it moves and its FLOPs. A kernel's floor is the time that
an H100 or H200 needs at the peaks of its data sheet, for moving or for computing, whichever is longer, summed over its
launches. The sum of all floors bounds how fast the model can train on one such GPU. `--registers` compiles each Triton
kernel for these compute capabilities, and adds registers and spilled bytes of a thread and shared memory of a program.
Needs Triton.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compiled import PRODUCTS, Other, RecordedLaunch, distinct  # noqa: E402
from benchmarks.launched import NUM_IDS, launches_of_block  # noqa: E402
from benchmarks.roofline_lines import OTHERS, Line, Step, config_of, lines_instead, step_of  # noqa: E402
from benchmarks.training import SHAPES  # noqa: E402
from megatron.model.flops import model_flops  # noqa: E402
from megatron.plan.gpus import GPUS  # noqa: E402

FP8_TFLOPS = 1979  # dense, from both cards' data sheets
CARDS = {"H100": GPUS["h100-80gb"], "H200": GPUS["h200-141gb"]}
PEAKS = {card: {"half": gpu.half_tflops * 1e12, "fp8": FP8_TFLOPS * 1e12, "fp32": gpu.fp32_tflops * 1e12}
         for card, gpu in CARDS.items()}
MODELS = {
    "133M": SHAPES["133M"],
    "650M": "--preset esm2-650m",
    "3B": "--preset esm2-3b",
}
IN_FP8 = " in FP8"
TOKENS_A_STEP = 2**21  # ESM-2's
TARGETS = {"133M": 600_000, "650M": 130_000}  # residues/s on an H200
LEAST_MFU = {"650M": 0.6}


@dataclass(frozen=True)
class Bound:
    """An upper bound on the training speed of a model; `products_s`: the seconds of matrix products in a step."""

    step_s: float
    products_s: float
    residues_per_s: float
    tokens_per_s: float
    mfu: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--registers", type=int, nargs="+", metavar="CAPABILITY",
                        help="such as 80 90 100: compile for these as well")
    options = parser.parse_args()
    steps = {model: step_of(MODELS[model]) for model in options.models}
    rows = {model: rows_of(MODELS[model], step) for model, step in steps.items()}
    print_rows(rows)
    print_launches(steps)
    print_bounds(steps | {f"{model}{IN_FP8}": step_of(f"{MODELS[model]} --fp8 hybrid") for model in steps})
    if options.registers:
        print_registers(rows, options.registers)


def rows_of(flags: str, step: Step) -> dict[tuple[str, ...], Line]:
    """The lines of a model, and the sums of each part, by (part, kernel, pass)."""
    rows: dict[tuple[str, ...], Line] = {}
    num_layers = step.config.model.num_layers
    for part, lines, times in (("a block", step.block, 1), ("all blocks", step.block, num_layers),
                               ("around the blocks", step.around, 1), ("update of all parameters", step.update, 1),
                               ("instead", lines_instead(flags, (*step.block, *step.around, *step.update)), 1)):
        if part != "all blocks":
            rows |= {(part, line.kernel.split(OTHERS)[0], line.side): line for line in lines}
        if part != "instead":
            launches = [launch for line in lines for launch in line.launches]
            rows[part, "", "all"] = Line(f"**{part}**", "all", launches * times)
    return rows


def floor_s(launches: Iterable[RecordedLaunch | Other], card: str) -> float:
    """The least seconds that launches take, one after another."""
    return sum(max(_memory_s(launch, card), _arithmetic_s(launch, card)) for launch in launches)


def is_arithmetic(launches: Iterable[RecordedLaunch | Other], card: str) -> bool:
    """Whether the launches are bound by arithmetic, not by memory."""
    launches = list(launches)
    return sum(_arithmetic_s(each, card) for each in launches) > sum(_memory_s(each, card) for each in launches)


def bound(step: Step, card: str, num_micro_batches: int) -> Bound:
    """The bound on one GPU, if all kernels run at their floors with nothing between them.

    `num_micro_batches`: between two updates.
    """
    config, batch = step.config, step.batch
    of_step = [launch for lines, times in ((step.block, config.model.num_layers), (step.around, 1)) for line in lines
               for launch in line.launches * times]
    products = [launch for launch in of_step if launch.name in PRODUCTS]
    step_s = num_micro_batches * floor_s(of_step, card) + sum(floor_s(line.launches, card) for line in step.update)
    flops = model_flops(config.model, NUM_IDS, batch.num_tokens, batch.num_pairs, batch.num_targets)
    in_step = (batch.num_residues, batch.num_tokens, flops / PEAKS[card]["half"])
    return Bound(step_s, num_micro_batches * floor_s(products, card),
                 *(num_micro_batches * number / step_s for number in in_step))


def print_rows(rows: dict[str, dict[tuple[str, ...], Line]]) -> None:
    """Print the table of kernels, for all models."""
    for model in rows:
        sizes = config_of(MODELS[model]).model
        print(f"{model}: {sizes.num_layers} x {sizes.hidden_size}, feed-forward {sizes.ffn_hidden_size:,}")
    heads = [f"{model} {what}" for model in rows for what in (
        "MB", "GFLOP", "FLOP a byte", *(f"{card} µs" for card in CARDS))]
    print_line("kernel", "pass", *heads)
    print_line(*["---"] * (2 + len(heads)))
    for key, first in next(iter(rows.values())).items():
        print_line(first.kernel, first.side, *(cell for of_model in rows.values() for cell in _cells(of_model[key])))


def _cells(line: Line) -> list[str]:
    """The cells of a line for one model; a dagger marks floors that are bound by arithmetic."""
    floors = [f"{floor_s(line.launches, card) * 1e6:,.1f}{'†' * is_arithmetic(line.launches, card)}" for card in CARDS]
    return [f"{line.num_bytes / 1e6:,.1f}", f"{line.flops / 1e9:,.2f}", f"{line.flops / line.num_bytes:,.1f}", *floors]


def print_launches(steps: dict[str, Step]) -> None:
    """Print how many kernels a block launches, compared with plain PyTorch."""
    print()
    for model, step in steps.items():
        ways = [launches_of_block(step.config, takes_triton=takes, batch=step.batch) for takes in (True, False)]
        ours, plain = (f"{sum(each.num_pointwise for each in way)} kernels that move "
                       f"{sum(each.num_bytes for each in way) / 1e6:,.0f} MB" for way in ways)
        print(f"{model}: besides matrix products and attention a block launches {ours}; in plain PyTorch {plain}")


def print_registers(rows: dict[str, dict[tuple[str, ...], Line]], capabilities: Sequence[int]) -> None:
    """Print the resources of each Triton kernel, the maximum over its launches."""
    print("\nCompiled, by compute capability: registers a thread (bytes that it spills), KB that a program shares\n")
    heads = [f"{capability / 10}, {model}" for capability in capabilities for model in rows]
    print_line("kernel", "pass", *heads)
    print_line(*["---"] * (2 + len(heads)))
    for key, first in next(iter(rows.values())).items():
        found = [_resources(of_model[key].launches, capability) for capability in capabilities
                 for of_model in rows.values()]
        if all(found) and key[1]:
            print_line(first.kernel, first.side, *found)


def _resources(launches: Sequence[RecordedLaunch | Other], capability: int) -> str:
    compiled = distinct(launch for launch in launches if isinstance(launch, RecordedLaunch))
    found = [launch.resources(capability) for launch in compiled]
    if not found:
        return ""
    registers, spilled, shared = map(max, zip(*((one.registers, one.spilled, one.shared) for one in found),
                                              strict=True))
    return f"{registers} ({spilled}), {shared / 1024:.1f}"


def print_line(*cells: str) -> None:
    """Print one line of a table."""
    print(f"| {' | '.join(cells)} |")


def print_bounds(steps: dict[str, Step]) -> None:
    """Print the bound on each model's speed, and the targets as shares of it."""
    print("\nAt most, every kernel at its floor:\n")
    heads = ("model", "card", "tokens a step", "step, ms", "tokens/s", "residues/s", "of bf16's peak", "aim")
    print_line(*heads)
    print_line(*["---"] * len(heads))
    for model, step in steps.items():
        tokens = len(step.batch.sequence.tokens_t)
        for card in CARDS:
            for number in (1, TOKENS_A_STEP // tokens):
                most = bound(step, card, number)
                beside = bound(steps[model.removesuffix(IN_FP8)], card, number)
                gain = f"{most.tokens_per_s / beside.tokens_per_s:.2f} times as fast as in bf16"
                print_line(model, card, f"{number * tokens:,}", f"{most.step_s * 1e3:,.1f}",
                           f"{most.tokens_per_s:,.0f}", f"{most.residues_per_s:,.0f}", f"{most.mfu:.0%}",
                           gain if model.endswith(IN_FP8) else _aim(model, card, most))


def _aim(model: str, card: str, most: Bound) -> str:
    said = []
    if model in TARGETS and card == "H200":
        said.append(f"{TARGETS[model]:,} residues/s: {_share(TARGETS[model] / most.residues_per_s, most)}")
    if model in LEAST_MFU:
        said.append(f"MFU {LEAST_MFU[model]:.0%}: {_share(LEAST_MFU[model] / most.mfu, most)}")
    return "; ".join(said)


def _share(share: float, most: Bound) -> str:
    """A share of the bound as text, with the share that products must reach if everything else is at its floor."""
    if share > 1:
        return f"above the bound ({share:.2f} times)"
    spared_s = most.step_s / share - most.step_s
    return f"{share:.0%} of the bound, products at {most.products_s / (most.products_s + spared_s):.0%} of theirs"


def _memory_s(launch: RecordedLaunch | Other, card: str) -> float:
    return launch.num_bytes / (CARDS[card].memory_bandwidth * 1e9)


def _arithmetic_s(launch: RecordedLaunch | Other, card: str) -> float:
    return launch.flops / PEAKS[card][launch.units]


if __name__ == "__main__":
    main()
