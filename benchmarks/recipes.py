"""Compares training recipes that differ in one change each, on one corpus: `python benchmarks/recipes.py PREFIX`.

PREFIX is `proteins_demo` (train and valid). An arm is a set of flags of `pretrain_tape.py`. All arms are trained on the
same number of rows, with each seed, and evaluated on all validation proteins with the same masks. Runs are recorded in
recipes.jsonl, a line each, and not repeated, so that a program that was killed can continue. Runs of the same seed and
precision differ only in the arm; beside the mean loss, the table has the mean of such paired differences from "muon"
(BERT with Muon) or "recipe".

    python benchmarks/recipes.py PREFIX --size 6x256 --rows 5600 --seeds 1 2 --arms recipe "recipe - conv"   only these
    python benchmarks/recipes.py --table                                             prints the results so far
    python benchmarks/recipes.py --rates benchmarks/rates.png                        draws the best Muon rate by width
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import processor  # noqa: E402
from megatron.checkpoint.metrics import read_records  # noqa: E402
from megatron.finetune.predictions.metrics import with_spread  # noqa: E402

RESULTS = ROOT / "benchmarks" / "recipes.jsonl"
SIZES = {f"{layers}x{width}": f"--num-layers {layers} --hidden-size {width} --num-attention-heads {width // 32}"
         for layers, width in ((4, 64), (4, 128), (4, 256), (6, 256))}
COMMON = ("--split 40000,2000,0 --seq-length 1024 --micro-batch-size 2 --attention-dropout 0 --hidden-dropout 0 "
          "--lr-decay-style cosine --lr-warmup-fraction 0.1 --adam-beta2 0.98 --eval-iters 0 "
          "--eval-interval 1000000 --log-interval 50")
DIGITS = 4  # of a loss in nats
PRECISIONS = {"auto": "--precision auto", "fp32": "", "bf16": "--bf16"}
ADAMW = "--lr 1e-3 --min-lr 1e-4"
BEST_ADAMW = "--lr 7e-4 --min-lr 7e-5"
MUON = "--optimizer muon --lr 1e-3 --min-lr 0"
NORMUON = MUON.replace("muon", "normuon")
MODEL = {"rotary": "--position-embedding-type rope", "rmsnorm": "--normalization RMSNorm", "qknorm": "--qk-layernorm",
         "relu2": "--squared-relu", "zero": "--zero-init-output", "untied": "--untie-embeddings-and-output-weights",
         "conv": "--qkv-conv-kernel 5"}
MORE = {"value": "--value-embeddings", "unet": "--unet-skips", "x0": "--x0-skips"}
RECIPE = f"{MUON} {' '.join(MODEL.values())}"
RECIPE_RATE, RATES_ROWS = 0.01, 600  # the default of --muon-lr; the rows of the runs that compare rates
WSD = "--lr-decay-style WSD --lr-wsd-decay-style minus_sqrt --lr-wsd-decay-iters"
# Arms by name: the flags and the rows of a step. In the flags {rows} stands for the run's rows, {fifth} and {half} for
# such parts of its steps.
ARMS: dict[str, tuple[str, int]] = {
    **{f"adamw, lr {lr}": (f"--lr {lr} --min-lr {float(lr) / 10:g}", 4) for lr in ("5e-4", "1e-3", "1.4e-3", "2e-3")},
    "adamw, beta2 0.95": (f"{ADAMW} --adam-beta2 0.95", 4), "adamw, beta2 0.999": (f"{ADAMW} --adam-beta2 0.999", 4),
    "adamw, warm-up 0.3": (f"{ADAMW} --lr-warmup-fraction 0.3", 4),
    "adamw, warm-up 0.3, lr 2e-3": ("--lr 2e-3 --min-lr 2e-4 --lr-warmup-fraction 0.3", 4),
    "adamw, 2 rows": (ADAMW, 2), "adamw, 2 rows, lr 7e-4": (BEST_ADAMW, 2),
    "adamw, 2 rows, lr 5e-4": ("--lr 5e-4 --min-lr 5e-5", 2),
    **{f"adamw, 2 rows, lr {lr}, beta2 0.95": (f"--lr {lr} --min-lr {float(lr) / 10:g} --adam-beta2 0.95", 2)
       for lr in ("2.5e-4", "3.5e-4", "5e-4", "7e-4", "1e-3")},
    "adamw, 2 rows, lr 7e-4, beta2 0.9": (f"{BEST_ADAMW} --adam-beta2 0.9", 2),
    **{f"adamw, 2 rows, lr {lr}, beta2 0.95, warm-up 0.3":
       (f"--lr {lr} --min-lr {float(lr) / 10:g} --adam-beta2 0.95 --lr-warmup-fraction 0.3", 2)
       for lr in ("7e-4", "1e-3")},
    **{f"adamw, 1 row, lr {lr}, beta2 0.95":
       (f"--micro-batch-size 1 --lr {lr} --min-lr {float(lr) / 10:g} --adam-beta2 0.95", 1)
       for lr in ("3.5e-4", "5e-4")},
    "adamw, 1 row, lr 5e-4, beta2 0.95, mask 0.3":
    ("--micro-batch-size 1 --lr 5e-4 --min-lr 5e-5 --adam-beta2 0.95 --mask-prob 0.3", 1),
    **{f"adamw, 2 rows, lr 7e-4, beta2 0.95, mask {share}":
       (f"{BEST_ADAMW} --adam-beta2 0.95 --mask-prob {share}", 2) for share in (0.3, 0.4)},
    "adamw, 2 rows, lr 7e-4, to 0": (f"{BEST_ADAMW} --min-lr 0", 2),
    "adamw, 8 rows": (ADAMW, 8), "adamw, 8 rows, lr 2e-3": ("--lr 2e-3 --min-lr 2e-4", 8),
    "muon": (MUON, 4), "normuon": (NORMUON, 4),
    **{f"muon + {name}": (f"{MUON} {flags}", 4) for name, flags in (MODEL | MORE).items()},
    "muon + swiglu": (f"{MUON} --swiglu", 4),
    "recipe": (RECIPE, 4),
    **{f"recipe - {name}": (f"{MUON} {' '.join(flags for other, flags in MODEL.items() if other != name)}", 4)
       for name in MODEL},
    "recipe - muon": (f"{ADAMW} {' '.join(MODEL.values())}", 4),
    "recipe - muon, lr 2e-3": (f"--lr 2e-3 --min-lr 2e-4 {' '.join(MODEL.values())}", 4),
    "recipe - muon, lr 5e-3": (f"--lr 5e-3 --min-lr 5e-4 {' '.join(MODEL.values())}", 4),
    **{f"recipe + {name}": (f"{RECIPE} {flags}", 4) for name, flags in MORE.items()},
    "recipe, swiglu": (RECIPE.replace("--squared-relu", "--swiglu"), 4),
    "recipe, normuon": (RECIPE.replace("muon", "normuon"), 4),
    **{f"recipe, muon-lr {lr}": (f"{RECIPE} --muon-lr {lr}", 4) for lr in (0.0025, 0.005, 0.007, 0.014, 0.02, 0.04)},
    **{f"recipe, mask {share}": (f"{RECIPE} --mask-prob {share}", 4) for share in (0.1, 0.2, 0.3, 0.4)},
    "recipe, mask 0.3 to 0.15": (f"{RECIPE} --mask-prob 0.3 0.15 {{rows}}", 4),
    "recipe, 2 rows": (RECIPE, 2), "recipe, 8 rows": (RECIPE, 8),
    "recipe, 8 rows of 512": (f"{RECIPE} --seq-length 512 --micro-batch-size 4 --global-batch-size 8", 4),
    "recipe, 2 rows of 2048": (f"{RECIPE} --seq-length 2048 --micro-batch-size 1 --global-batch-size 2", 4),
    "recipe, WSD over the last fifth": (f"{RECIPE} {WSD} {{fifth}}", 4),
    "recipe, WSD over the last half": (f"{RECIPE} {WSD} {{half}}", 4),
    "recipe, linear": (f"{RECIPE} --lr-decay-style linear", 4), "recipe, to a tenth": (f"{RECIPE} --min-lr 1e-4", 4),
    "recipe, ema 0.98": (f"{RECIPE} --ema 0.98", 4),
    "recipe, cautious decay 0.1": (f"{RECIPE} --weight-decay 0.1 --cautious-weight-decay", 4),
}


def flags_of(arm: str, rows: int) -> tuple[str, int, int]:
    """For a run of an arm on `rows` rows: the flags, the rows of a step, and the number of steps."""
    flags, batch = ARMS[arm]
    steps = rows // batch
    return flags.format(rows=rows, fifth=steps // 5, half=steps // 2), batch, steps


def trained(prefix: str, size: str, rows: int, arm: str, seed: int, precision: str) -> dict:
    """Make one run on `rows` rows; returns its record, with the loss, the seconds of training and the precision.

    `processor_s` are processor seconds of all threads, including loading, evaluating and saving; `cores`: how many
    cores it could use.
    """
    flags, batch, steps = flags_of(arm, rows)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "pretrain_tape.py"), "--global-batch-size", str(batch),
                   *shlex.split(f"{COMMON} {PRECISIONS[precision]} {SIZES[size]} {flags}"), "--train-iters", str(steps),
                   "--seed", str(seed), "--data-path", prefix, "--save", folder]
        before = _processor_s_of_children()
        done = subprocess.run(command, capture_output=True, text=True)
        processor_s = _processor_s_of_children() - before
        if done.returncode:
            raise SystemExit(f"{arm}: exit status {done.returncode}; {done.stderr.strip()}")
        if precision == "auto":
            precision = next(line.split()[1].strip(";") for line in done.stdout.splitlines()
                             if line.startswith("precision: "))
        records = read_records(Path(folder) / "metrics.jsonl")
    kind = "valid_ema" if "--ema " in flags else "valid"
    last = next(record for record in reversed(records) if record["kind"] == kind)
    return {"size": size, "rows": rows, "arm": arm, "seed": seed, "precision": precision, "flags": flags,
            "steps": steps, "loss": round(last["loss"], 5), "training_s": round(last["training_s"], 1),
            "processor_s": round(processor_s, 1), "cores": len(os.sched_getaffinity(0)), "processor": processor()}


def _processor_s_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def known() -> list[dict]:
    """The records of all runs made so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def keep(record: dict) -> None:
    """Append the record of a run to recipes.jsonl."""
    with RESULTS.open("a") as file:
        file.write(f"{json.dumps(record)}\n")


def table(records: list[dict]) -> str:
    """A table of the arms, the best first: mean loss with its spread over runs, and the gain over the base arm."""
    arms = defaultdict[tuple[str, int, str], list[dict]](list)
    for record in records:
        arms[record["size"], record["rows"], record["arm"]].append(record)
    lines = ["| size | rows | arm | validation loss | runs | gain, in pairs |", "| --- | --- | --- | --- | --- | --- |"]
    for (size, rows, arm), runs in sorted(arms.items(), key=lambda item: (*item[0][:2], mean_loss(item[1]))):
        counts = Counter(run["precision"] for run in runs)
        counted = ", ".join(f"{counts[precision]} {precision}" for precision in sorted(counts))
        gains = gains_of(runs, arms.get((size, rows, base_of(arm)), []))
        gain = f"{with_spread(gains, DIGITS)} ({len(gains)})" if gains else "–"
        losses = with_spread([run["loss"] for run in runs], DIGITS)
        lines.append(f"| {size} | {rows:,} | {arm} | {losses} | {counted} | {gain} |")
    return "\n".join(lines)


def base_of(arm: str) -> str:
    """The arm that this one differs from by one change ("muon" or "recipe"); itself if there is none."""
    return next((base for base in ("muon", "recipe") if arm.startswith((f"{base} ", f"{base},"))), arm)


def gains_of(runs: list[dict], bases: list[dict]) -> list[float]:
    """How much lower each run's loss is than that of the base's run with the same seed and precision, if there is one.
    """
    losses = {(base["seed"], base["precision"]): base["loss"] for base in bases if base["arm"] != runs[0]["arm"]}
    keys = [(run["seed"], run["precision"]) for run in runs]
    return [losses[key] - run["loss"] for key, run in zip(keys, runs, strict=True) if key in losses]


def mean_loss(runs: list[dict]) -> float:
    """The mean loss of some runs."""
    return statistics.fmean(run["loss"] for run in runs)


def rates_of(records: list[dict]) -> dict[str, dict[float, float]]:
    """The mean loss of the recipe, by size and --muon-lr, over runs on RATES_ROWS rows."""
    found = defaultdict[str, dict[float, list[float]]](lambda: defaultdict(list))
    for record in records:
        arm, _, rate = record["arm"].partition(", muon-lr ")
        if record["rows"] == RATES_ROWS and arm == "recipe":
            found[record["size"]][float(rate or RECIPE_RATE)].append(record["loss"])
    return {size: {rate: statistics.fmean(losses[rate]) for rate in sorted(losses)} for size, losses in found.items()}


def best_rate(losses: dict[float, float]) -> float:
    """The rate with the lowest loss, by a parabola in the log of the rate through the best rate and its two neighbours.

    The best rate that was tried itself if it is at an end, or if that parabola has no minimum.
    """
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if not 0 < at < len(rates) - 1:
        return rates[at]
    near = rates[at - 1:at + 2]
    curve, slope, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return float(np.exp(-slope / (2 * curve))) if curve > 0 else rates[at]


def draw_rates(rates: dict[str, dict[float, float]], path: Path) -> None:
    """Draw each size's losses, minus their minimum, over the rate, with dotted lines at the best rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    panel = figure.subplots()
    for size, losses in sorted(rates.items(), key=lambda item: int(item[0].split("x")[1])):
        least = min(losses.values())
        [line] = panel.plot([*losses], [loss - least for loss in losses.values()], marker="o",
                            label=f"{size}: {best_rate(losses):.4f}")
        panel.axvline(best_rate(losses), color=line.get_color(), linestyle=":", linewidth=1)
    panel.set(xscale="log", xlabel="--muon-lr", ylabel="validation loss above the size's least, nats")
    ticks = sorted({rate for losses in rates.values() for rate in losses})
    panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    panel.minorticks_off()
    panel.legend(title="size: best rate")
    figure.savefig(path)


def main() -> None:
    """Make the missing runs, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", help="prefix of proteins_demo's .bin and .idx")
    parser.add_argument("--size", choices=SIZES, default="4x128")
    parser.add_argument("--rows", type=int, default=1400, help="of 1,024 tokens, in all: 1400 are 350 steps of 4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: the faster, and a run in either counts as done")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--rates", type=Path, metavar="PNG", help="train nothing, and draw the rates of Muon by width")
    arguments = parser.parse_args()
    if arguments.rates is not None:
        draw_rates(rates_of(known()), arguments.rates)
        return
    if arguments.prefix is None and not arguments.table:
        parser.error("give the prefix of a corpus, --table or --rates")
    size, rows = arguments.size, arguments.rows
    done = {(record["size"], record["rows"], record["arm"], record["seed"]) for record in known()
            if arguments.precision in ("auto", record["precision"])}
    todo = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms
            if (size, rows, arm, seed) not in done and not arguments.table]
    for number, (arm, seed) in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {arm}, seed {seed}", end=" … ", flush=True)
        record = trained(arguments.prefix, size, rows, arm, seed, arguments.precision)
        keep(record)
        print(f"{record['loss']:.4f}", flush=True)
    print(table(known()))


if __name__ == "__main__":
    main()
