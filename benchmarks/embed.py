"""Compares embedding with transformers: `python benchmarks/embed.py FASTA [--presets esm2-8m …] [--proteins 2000]`.

Both compute the mean of each protein's last hidden states with the same random weights, in bf16 and fp32, from texts to
arrays. This project packs the proteins. EsmModel of transformers (SDPA) takes padded batches: of proteins sorted by
length, up to a number of tokens, and of a number of proteins in their given order. The cases alternate. Peak memory is
that of a separate process while it embeds the proteins of one round, including PyTorch and the weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import processor, spread  # noqa: E402
from megatron import load_pretrained  # noqa: E402
from megatron.config import ModelConfig  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.infer.proteins import ProteinFiles  # noqa: E402

VOCAB = Vocab.from_file("esm")
Way = Callable[[Sequence[str]], np.ndarray]


def their_model(model: ModelConfig, attention: str | None = None) -> torch.nn.Module:
    """transformers' EsmForMaskedLM of that shape with random weights, without dropout; `attention`: its back-end."""
    from transformers import EsmConfig, EsmForMaskedLM

    return EsmForMaskedLM(EsmConfig(
        vocab_size=VOCAB.size, hidden_size=model.hidden_size, token_dropout=True, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, intermediate_size=model.ffn_hidden_size,
        position_embedding_type="rotary", max_position_embeddings=1026, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, emb_layer_norm_before=False, mask_token_id=VOCAB.mask_id,
        pad_token_id=VOCAB.pad_id, attn_implementation=attention))


def sorted_batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Batches of indices, the longest proteins first, that have at most `most_tokens` when padded."""
    batch = list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * (lengths[batch[0]] + 2) > most_tokens:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def batches_as_they_come(lengths: Sequence[int], num_proteins: int) -> Iterator[list[int]]:
    """Batches of the indices of `num_proteins` proteins each, in their order."""
    for start in range(0, len(lengths), num_proteins):
        yield list(range(start, min(start + num_proteins, len(lengths))))


@torch.no_grad()
def their_way(model: torch.nn.Module, proteins: Sequence[str], batches: Iterator[list[int]]) -> np.ndarray:
    """The mean hidden states of proteins [g, h], computed by transformers in padded batches."""
    means = np.empty((len(proteins), model.config.hidden_size), np.float32)
    table = np.zeros(256, np.int64)
    table[[ord(letter) for letter in VOCAB.tokens if len(letter) == 1]] = [
        index for index, letter in enumerate(VOCAB.tokens) if len(letter) == 1]
    for batch in batches:
        texts = [np.frombuffer(proteins[place].encode(), np.uint8) for place in batch]
        tokens = torch.full((len(batch), max(map(len, texts)) + 2), VOCAB.pad_id)
        for row_t, text in zip(tokens, texts, strict=True):
            row_t[:len(text) + 2] = torch.from_numpy(np.concatenate([[VOCAB.cls_id], table[text], [VOCAB.sep_id]]))
        hidden = model.esm(input_ids=tokens, attention_mask=(tokens != VOCAB.pad_id).long()).last_hidden_state.float()
        for place, row_th, text in zip(batch, hidden, texts, strict=True):
            means[place] = row_th[1:len(text) + 1].mean(0).numpy()
    return means


def ways_of(arguments: argparse.Namespace, preset: str, folder: str, precision: str) -> dict[str, Way]:
    """Every way to embed proteins with a preset's model, by name."""
    torch.manual_seed(0)
    model = their_model(parse(["--preset", preset])[0].model).eval()
    model.save_pretrained(folder)
    ours = load_pretrained(folder, device="cpu", precision=precision)
    model = model.bfloat16() if precision == "bf16" else model
    ways: dict[str, Way] = {"packed, this project": ours.embed}
    for size in arguments.sorted:
        ways[f"transformers, sorted, {size:,} tokens"] = lambda proteins, size=size: their_way(
            model, proteins, sorted_batches([len(each) for each in proteins], size))
    for size in arguments.unsorted:
        ways[f"transformers, as they come, {size} proteins"] = lambda proteins, size=size: their_way(
            model, proteins, batches_as_they_come([len(each) for each in proteins], size))
    return ways


def read(path: str, number: int) -> list[str]:
    """The first `number` proteins of a file, cropped to 1,022 residues, which both can read."""
    letters = np.array([ord(token) if len(token) == 1 else 0 for token in VOCAB.tokens], np.uint8)
    found = (letters[protein.residues].tobytes().decode() for protein in ProteinFiles([path], "text", None, VOCAB))
    return [text[:1022] for text, _ in zip(found, range(number), strict=False)]


def alone(arguments: argparse.Namespace, proteins: Sequence[str]) -> None:
    """Embed proteins in one way, and print the peak memory of this process meanwhile, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        way = ways_of(arguments, arguments.presets[0], folder, arguments.precisions[0])[arguments.alone]
    way(["ACDE"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    way(proteins[::arguments.rounds])
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def memory_of(arguments: argparse.Namespace, preset: str, precision: str, way: str) -> float:
    """The peak memory of embedding in one way, in MiB, measured in a separate process."""
    command = [sys.executable, __file__, arguments.fasta, "--presets", preset, "--precisions", precision, "--proteins",
               str(arguments.proteins), "--rounds", str(arguments.rounds), "--sorted", *map(str, arguments.sorted),
               "--unsorted", *map(str, arguments.unsorted), "--alone", way]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    """Time every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta")
    parser.add_argument("--presets", nargs="+", default=["esm2-8m", "esm2-35m"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--proteins", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=8, help="into which the proteins are cut: the ways alternate")
    parser.add_argument("--sorted", nargs="*", type=int, default=[2048, 4096, 8192], help="tokens of a padded batch of "
                        "proteins sorted by length")
    parser.add_argument("--unsorted", nargs="*", type=int, default=[8, 16], help="proteins of a batch as they come")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import transformers

    proteins = read(arguments.fasta, arguments.proteins)
    if arguments.alone:
        alone(arguments, proteins)
        return
    print(f"{processor()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads: {len(proteins)} proteins, {sum(map(len, proteins)):,} residues\n")
    print("| preset | precision | way | residues/s (quartiles) | packed is faster by | memory, MiB |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for preset in arguments.presets:
        for precision in arguments.precisions:
            compare(arguments, preset, precision, proteins)


def compare(arguments: argparse.Namespace, preset: str, precision: str, proteins: Sequence[str]) -> None:
    """Time every way with one model, and print its rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(arguments, preset, folder, precision)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(proteins[:20])
    for number in range(arguments.rounds):
        some = proteins[number::arguments.rounds]
        for name, way in ways.items():
            began_s = time.perf_counter()
            way(some)
            speeds[name].append(sum(map(len, some)) / (time.perf_counter() - began_s))
    first, *_ = ways
    for name, each in speeds.items():
        ratio = statistics.median(speeds[first]) / statistics.median(each)
        print(f"| {preset} | {precision} | {name} | {spread(each, '.0f')} | {ratio:.2f} | "
              f"{memory_of(arguments, preset, precision, name):.0f} |", flush=True)


if __name__ == "__main__":
    main()
