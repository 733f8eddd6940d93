"""Training steps a second on packed proteins: `python benchmarks/train_step.py [--repeats 5] [--large]`.

Residues a second of whole steps (forward, backward, clipping, AdamW) on one row of 2,176 positions, on the GPU if there
is one. Beside the project's model stands `transformers`' BertForMaskedLM, where it is installed, on the same proteins
padded to the longest. The cases alternate.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.model.inputs import Inputs  # noqa: E402

from benchmarks.attention import LENGTHS  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.kernels.attention import Boundaries  # noqa: E402
from megatron.model.flops import model_flops  # noqa: E402
from megatron.model.initialisation import initialise  # noqa: E402
from megatron.model.protein_model import ProteinModel  # noqa: E402
from megatron.optim.optimizer import Optimizer  # noqa: E402
from megatron.optim.scaling import LossScale  # noqa: E402

Step = Callable[[], None]
PRECISIONS = ("", "--bf16")


def our_step(layers: int, hidden: int, precision: str, device: torch.device) -> tuple[Step, int]:
    """One training step of this project's model, and its model FLOPs."""
    flags = f"--preset tape --no-bf16 --num-layers {layers} --hidden-size {hidden} --num-attention-heads {hidden // 64}"
    dropout = "--attention-dropout 0 --hidden-dropout 0"
    config, _ = parse([*flags.split(), *dropout.split(), *precision.split()])
    model = ProteinModel(config.model, config.precision, 128)
    initialise(model, seed=1)
    model.to(device)
    optimizer = Optimizer(dict(model.named_parameters()), config.optimizer)
    scale = LossScale(config.precision, device)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    tokens = torch.randint(6, 31, (sum(LENGTHS),), device=device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
    targets = torch.arange(1, sum(LENGTHS), 7, device=device)
    inputs = Inputs(tokens, positions, Boundaries(ends, LENGTHS), targets, tokens[targets])

    def step() -> None:
        loss, _ = model(inputs)
        (loss / len(targets)).backward()
        optimizer.step(1e-4, scale)

    return step, model_flops(config.model, 128, LENGTHS, len(targets))


def bert_step(layers: int, hidden: int, precision: str, device: torch.device) -> Step | None:
    """The same of transformers' BertForMaskedLM, padded, under autocast for bf16; None without transformers."""
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError:
        return None
    config = BertConfig(vocab_size=128, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
                        intermediate_size=4 * hidden, max_position_embeddings=2176, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    proteins = [torch.randint(6, 31, (length,)) for length in LENGTHS]
    tokens = torch.nn.utils.rnn.pad_sequence(proteins, batch_first=True).to(device)
    mask = (tokens > 0).long()
    labels = torch.where((torch.rand(tokens.shape, device=device) < 0.15) & (mask > 0), tokens, -100)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(precision)):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, device: torch.device) -> float:
    """The time of one step."""
    began_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def main() -> None:
    """Time every case `--repeats` times, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="the published 16 x 1024 model as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [(4, 256), (4, 1024), *([(16, 1024)] if arguments.large else [])]
    print("| layers x hidden | precision | residues/s (range) | model TFLOP/s | transformers: residues/s (range) |")
    print("| --- | --- | --- | --- | --- |")
    residues = sum(LENGTHS) - len(LENGTHS)
    for layers, hidden in shapes:
        for precision in PRECISIONS:
            ours, flops = our_step(layers, hidden, precision, device)
            theirs = bert_step(layers, hidden, precision, device)
            steps = [step for step in (ours, theirs) if step is not None]
            runs = [[seconds(step, device) for step in steps] for _ in range(arguments.repeats + 2)][2:]
            columns = list(zip(*runs, strict=True))
            cells = [f"{residues / statistics.median(t):.0f} ({residues / max(t):.0f}–{residues / min(t):.0f})"
                     for t in columns]
            tflops = flops / statistics.median(columns[0]) / 1e12
            print(f"| {layers} x {hidden} | {precision.strip('-') or 'fp32'} | {cells[0]} | {tflops:.3f} | "
                  f"{cells[1] if len(cells) > 1 else 'not installed'} |", flush=True)


if __name__ == "__main__":
    main()
