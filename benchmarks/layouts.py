"""Compares layouts with one rank: `python benchmarks/layouts.py PREFIX [--model NAME] [--steps 50] [--only NAME …]`.

PREFIX names an indexed dataset, PREFIX.bin and .idx. Each layout trains the same model (4 layers x 128 with the block
of a family, or with Muon; rows of 512) on the same global batch, in fp32 without dropout, on gloo ranks of one thread.
The loss and gradient norm of each step and the final weights are compared with those of one rank. Then each layout
takes 10 steps with dropout. Their losses are compared with one rank's, and all bits with those of the same layout
without recomputation (or with a rerun of that).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.checkpoint.store import open_place, place_of  # noqa: E402

# A learning rate of 1e-3, as for larger batches, gives spikes in the loss even on one rank, which amplify rounding.
FLAGS = ("--num-layers 4 --hidden-size 128 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0 --lr 3e-4 "
         "--min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1 --adam-beta2 0.98 --train-iters 350 "
         "--seq-length 512 --micro-batch-size 1 --global-batch-size 4 --log-interval 1 --num-workers 0 "
         "--eval-interval 1000 --eval-iters 1 --peak-tflops 1").split()
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1".split()

TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
LAYOUTS = {
    "1": (1, ""), "dp2": (2, ""), "dp2, optimizer sharded": (2, "--data-parallel-sharding optimizer"),
    "dp2, gradients sharded": (2, "--data-parallel-sharding gradients"),
    "dp2, parameters sharded": (2, "--data-parallel-sharding parameters"),
    "dp4, parameters sharded within 2": (4, "--data-parallel-sharding parameters --shard-within 2"),
    "tp2": (2, TP2), "tp2 + sequence parallel": (2, f"{TP2} --sequence-parallel"), "tp4": (4, TP4),
    "pp2": (2, PP2), "pp2, interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "pp2, zero-bubble": (2, f"{PP2} --pipeline-schedule zero-bubble"), "pp4": (4, PP4),
    "dp2 x tp2": (4, TP2), "dp2 x pp2": (4, PP2), "tp2 x pp2": (4, f"{TP2} {PP2}"),
    "cp2": (2, "--context-parallel-size 2"),
}
MODELS = {
    "proteinlm": "",
    "esm2": "--position-embedding-type rope --token-dropout --no-bias-gelu-fusion --vocab-file esm --protein-ends both",
    "protbert": "--norm-placement post --embedding-layernorm --no-bias-gelu-fusion --vocab-file protbert "
                "--protein-ends both",
    "recipe": "--position-embedding-type rope --rotary-percent 0.5 --normalization RMSNorm --norm-placement both "
              "--qk-layernorm --swiglu --disable-bias-linear --num-attention-heads 8 --num-query-groups 4 "
              "--untie-embeddings-and-output-weights --window-size 64 64 --window-attn-skip-freq 2 --value-embeddings "
              "--x0-skips --unet-skips --qkv-conv-kernel 3 --final-logit-softcapping 15 --zero-init-output",
    "muon": "--optimizer muon", "normuon": "--optimizer normuon",
    "demo": "--optimizer muon --position-embedding-type rope --normalization RMSNorm --qk-layernorm --squared-relu "
            "--zero-init-output --untie-embeddings-and-output-weights --qkv-conv-kernel 5",
}
RECOMPUTATION = {"none": "", "full": "--checkpoint-activations", "selective": "--recompute-granularity selective"}


def run(prefix: str, ranks: int, flags: list[str], steps: int, folder: str) -> tuple[list[dict], dict[str, Tensor]]:
    """Run one layout; returns the metrics of each step, and the final weights by name."""
    agent = ["-m", "megatron.parallel.launch", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(agent if ranks > 1 else []), str(ROOT / "pretrain_tape.py"), *FLAGS, *flags,
               "--data-path", prefix, "--exit-interval", str(steps), "--save", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stdout[-2000:]}")
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    weights = {name: tensor.read() for name, tensor in open_place(place_of(Path(folder), steps)).model.items()}
    return [record for record in records if record["kind"] == "train"], weights


def worst_relative(ours: list[dict], expected: list[dict], name: str) -> float:
    """The largest relative difference between two runs in the metric `name`, over all steps."""
    return max(abs(our[name] / one[name] - 1) for our, one in zip(ours, expected, strict=True))


def same_bits(ours: tuple[list[dict], dict[str, Tensor]], others: tuple[list[dict], dict[str, Tensor]]) -> bool:
    """Whether two runs have bitwise equal losses, gradient norms and weights."""
    same_curve = all(worst_relative(ours[0], others[0], name) == 0 for name in ("loss", "grad_norm"))
    return same_curve and all(ours[1][name].equal(others[1][name]) for name in ours[1])


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX")
    parser.add_argument("--model", choices=list(MODELS), default="proteinlm")
    parser.add_argument("--recomputed", nargs="+", choices=list(RECOMPUTATION), default=list(RECOMPUTATION))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    arguments = parser.parse_args()
    of_model = MODELS[arguments.model].split()
    print("| layout | recomputed | loss off by | gradient norm off by | weights off by | residues/s | "
          "with dropout off by |\n| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        expected, expected_weights = run(arguments.prefix, 1, of_model, arguments.steps, f"{folder}/one")
        one_dropped, _ = run(arguments.prefix, 1, [*of_model, *DROPOUT], 10, f"{folder}/one-dropout")
        for layout in arguments.only:
            ranks, flags = LAYOUTS[layout][0], [*of_model, *LAYOUTS[layout][1].split()]
            dropped = run(arguments.prefix, ranks, [*flags, *DROPOUT], 10, f"{folder}/{layout}-dropout")
            for recomputed in arguments.recomputed:
                place, together = f"{folder}/{layout}-{recomputed}", [*flags, *RECOMPUTATION[recomputed].split()]
                ours, weights = run(arguments.prefix, ranks, together, arguments.steps, place)
                loss, norm = (worst_relative(ours, expected, name) for name in ("loss", "grad_norm"))
                off = max(float((weights[name] - tensor).abs().max()) for name, tensor in expected_weights.items())
                again = run(arguments.prefix, ranks, [*together, *DROPOUT], 10, f"{place}-dropout-again")
                rerun = f"{worst_relative(again[0], one_dropped, 'loss'):.1e}"
                rerun += "" if same_bits(again, dropped) else " **and from its rerun**"
                speed = statistics.median(step["residues_per_s"] for step in ours)
                print(f"| {layout} | {recomputed} | {loss:.1e} | {norm:.1e} | {off:.1e} | {speed:.0f} | {rerun} |",
                      flush=True)


if __name__ == "__main__":
    main()
