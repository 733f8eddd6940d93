"""Compares training steps of ESM-2 with transformers: `python benchmarks/esm2_step.py [--presets esm2-8m …] [--bf16]`.

Both train on the same 8 shipped proteins, cropped to 1,022 residues between <cls> and <eos>, with 15 % of the residues
as targets. This project packs them into one sequence, and takes whole steps (forward, backward, clipping, AdamW).
EsmForMaskedLM of transformers, with either of its attention back-ends, takes one batch padded to the longest, four
batches of proteins of similar lengths, or one protein at a time, and sums to the same gradient. Uses the GPU if there
is one. The cases alternate.
"""

import argparse
import gzip
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.embed import VOCAB, their_model  # noqa: E402
from benchmarks.train_step import processor, spread  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.batches.batch import Batch, BatchShape, collate  # noqa: E402
from megatron.data.corpus.tokenizer import ResidueTokenizer  # noqa: E402
from megatron.data.rows.packed import Row  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.train.step.engine import build_engine  # noqa: E402
from megatron.train.step.meters import Meters  # noqa: E402
from megatron.train.step.train_step import TrainStep  # noqa: E402

NUM_PROTEINS, MOST_RESIDUES, WARM_UP = 8, 1022, 2
BATCHES = {"one padded batch": 1, "four by length": 4, "a protein at a time": NUM_PROTEINS}


def proteins() -> list[np.ndarray]:
    """The tokens, with <cls> and <eos>, of some of the shipped proteins, chosen at random."""
    with gzip.open(ROOT / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        text = file.read()
    sequences = ["".join(record.splitlines()[1:]) for record in text.split(">")[1:]]
    chosen = np.random.default_rng(1).choice(len(sequences), NUM_PROTEINS, replace=False)
    residues = [ResidueTokenizer(VOCAB).encode(sequences[index][:MOST_RESIDUES]) for index in chosen]
    return [np.concatenate([[VOCAB.cls_id], ids, [VOCAB.sep_id]]).astype(np.int64) for ids in residues]


def targets_of(protein: np.ndarray, seed: int) -> np.ndarray:
    """The positions of 15 % of a protein's residues, chosen at random."""
    return np.sort(1 + np.random.default_rng(seed).choice(len(protein) - 2, (len(protein) - 2) * 15 // 100, False))


def masked(protein: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The protein with the residues at `places` replaced by the mask."""
    return np.where(np.isin(np.arange(len(protein)), places), VOCAB.mask_id, protein)


def our_step(flags: list[str]) -> Callable[[], float]:
    """A function that takes this project's training step on all proteins, packed, and returns the loss."""
    config, _ = parse(flags)
    mesh = Mesh(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = build_engine(config, mesh, VOCAB.padded_size(config.model), mask_id=VOCAB.mask_id)
    meters = Meters(mesh.world, mesh.device)
    step, batch = TrainStep(engine, meters), _packed(proteins())

    def timed() -> float:
        step([batch], 1e-5, (False, False))
        return meters.read().loss

    return timed


def _packed(all_of_them: list[np.ndarray]) -> Batch:
    """A batch of one row with all proteins."""
    places = [targets_of(protein, seed) for seed, protein in enumerate(all_of_them)]
    lengths = np.array([len(protein) for protein in all_of_them])
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate([masked(*pair) for pair in zip(all_of_them, places, strict=True)])
    positions = np.concatenate([start + each for start, each in zip(starts, places, strict=True)])
    row = Row(tokens, lengths, positions, np.concatenate(all_of_them)[positions])
    return collate([row], BatchShape(len(tokens), len(lengths), len(positions), int(lengths.max()), num_ends=2))


def their_step(flags: list[str], attention: str, num_batches: int) -> Callable[[], float]:
    """A function that takes a step of transformers' EsmForMaskedLM on the same proteins, and returns the loss.

    `attention`: the back-end; `num_batches`: of the proteins, sorted by length and padded.
    """
    config = parse(flags)[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = their_model(config.model, attention).to(device).train()
    trained = [parameter for name, parameter in model.named_parameters() if "contact_head" not in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01, fused=True)
    batches, num_targets = _padded(proteins(), num_batches, device)

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision.bf16):
                logits = model(input_ids=tokens, attention_mask=(tokens != VOCAB.pad_id).long()).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / num_targets).backward()
            total += loss.detach() / num_targets
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def _padded(all_of_them: list[np.ndarray], num_batches: int,
            device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Padded batches of tokens and labels, of proteins sorted by length, and the number of targets."""
    order = sorted(range(len(all_of_them)), key=lambda index: len(all_of_them[index]))
    batches, num_targets = [], 0
    for group in np.array_split(np.array(order), num_batches):
        longest = max(len(all_of_them[index]) for index in group)
        tokens = torch.full((len(group), longest), VOCAB.pad_id)
        labels = torch.full((len(group), longest), -100)
        for row, index in enumerate(group):
            protein, places = all_of_them[index], targets_of(all_of_them[index], int(index))
            tokens[row, :len(protein)] = torch.from_numpy(masked(protein, places))
            labels[row, places] = torch.from_numpy(protein[places])
            num_targets += len(places)
        batches.append((tokens.to(device), labels.to(device)))
    return batches, num_targets


def main() -> None:
    """Time every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--presets", nargs="+", default=["esm2-8m", "esm2-35m"])
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    import transformers

    residues = sum(len(protein) - 2 for protein in proteins())
    print(f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads, {'bf16' if arguments.bf16 else 'fp32'}: {NUM_PROTEINS} proteins, "
          f"{residues} residues a step\n")
    print("| preset | way | residues/s (quartiles) | packed is faster by |\n| --- | --- | --- | --- |")
    for preset in arguments.presets:
        flags = ["--preset", preset, "--micro-batch-size", "1", "--global-batch-size", "1",
                 *([] if arguments.bf16 else ["--no-bf16"])]
        ways = {"packed, this project": our_step(flags)}
        for attention in ("eager", "sdpa"):
            for name, num_batches in BATCHES.items():
                ways[f"{attention}, {name}"] = their_step(flags, attention, num_batches)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UP + arguments.repeats):
            for name, step in ways.items():
                began_s = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began_s)
        ours_s = statistics.median(times["packed, this project"][WARM_UP:])
        for name, each in times.items():
            ratio = statistics.median(each[WARM_UP:]) / ours_s
            speeds = spread([residues / elapsed_s for elapsed_s in each[WARM_UP:]], ".0f")
            print(f"| {preset} | {name} | {speeds} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
