"""Measures the speed of training steps on packed proteins: `python benchmarks/train_step.py [--beside CHECKOUT]`.

Takes whole steps as the program does (forward, backward, clipping, AdamW), on rows of 2,176 positions, on the GPU if
there is one, and prints residues a second. They are compared with the step's matrix products alone, and, if it is
installed, with BertForMaskedLM of transformers, with either of its attention back-ends and compiled, on the same
proteins: in one batch padded to the longest, and in four batches sorted by length whose gradients are summed. With
--beside they are compared with another checkout of this project instead, each in its own process, only one of which
works at a time. The cases alternate.
"""

import argparse
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.checkout_step import VOCABULARY, TimedStep, build_step  # noqa: E402
from benchmarks.proteins import LENGTHS, packed_row  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.model.flops import model_flops  # noqa: E402

RESIDUES = sum(LENGTHS) - len(LENGTHS)
WARM_UP = 2  # the number of first steps of each case that do not count
THEIR_WAYS = ("eager", "sdpa", "sdpa compiled")  # how transformers' model is run
BATCHES = {"padded": 1, "by length": 4}


def flags_of(layers: int, hidden: int, precision: str) -> list[str]:
    """The flags of the program for a case."""
    return (f"--preset tape --no-bf16 --num-layers {layers} --hidden-size {hidden} --num-attention-heads "
            f"{hidden // 64} --attention-dropout 0 --hidden-dropout 0 {precision}").split()


def bert_steps(layers: int, hidden: int, precision: str, micro_batches: int) -> dict[str, Callable[[], float]]:
    """Training steps of transformers' BertForMaskedLM, by their names; {} if transformers is not installed."""
    if find_spec("transformers") is None:
        return {}
    return {f"{way}, {name}": bert_step((layers, hidden, precision), micro_batches, way, num_batches)
            for name, num_batches in BATCHES.items() for way in THEIR_WAYS}


def bert_step(case: tuple[int, int, str], micro_batches: int, way: str, num_batches: int) -> Callable[[], float]:
    """A function that takes a training step of transformers' BertForMaskedLM and returns its seconds.

    `case`: layers, hidden size and precision (autocast for bf16); `way`: one of THEIR_WAYS; `num_batches`: padded
    batches that the proteins are divided into.
    """
    from transformers import AutoModelForMaskedLM, BertConfig

    layers, hidden, precision = case
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention, _, compiled = way.partition(" ")
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers,
                        num_attention_heads=hidden // 64, intermediate_size=4 * hidden, max_position_embeddings=2176,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model: torch.nn.Module = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if compiled else model
    batches = _padded(num_batches, device)

    def step() -> float:
        began_s = time.perf_counter()
        for tokens, mask, labels in batches * micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(precision)):
                loss = run(input_ids=tokens, attention_mask=mask, labels=labels).loss
            (loss / (num_batches * micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    return step


def _padded(num_batches: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of padded proteins, sorted by length: token ids, which of them are tokens, and labels."""
    batches = []
    for lengths in torch.tensor(sorted(LENGTHS)).tensor_split(num_batches):
        proteins = [torch.randint(6, 31, (length,)) for length in lengths.tolist()]
        tokens = torch.nn.utils.rnn.pad_sequence(proteins, batch_first=True).to(device)
        labels = torch.where((torch.rand(tokens.shape, device=device) < 0.15) & (tokens > 0), tokens, -100)
        batches.append((tokens, (tokens > 0).long(), labels))
    return batches


def product_chain(layers: int, hidden: int, precision: str, micro_batches: int) -> Callable[[], float]:
    """A function that does only the matrix products of a step, forward and backward, and returns its seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, targets = sum(LENGTHS), packed_row().num_targets
    blocks = [(tokens, hidden, 3 * hidden), (tokens, hidden, hidden), (tokens, hidden, 4 * hidden),
              (tokens, 4 * hidden, hidden)] * layers
    operands = [[torch.randn(shape, device=device).to(torch.bfloat16 if precision else torch.float32)
                 for shape in ((rows, width), (out, width), (rows, out))]
                for rows, width, out in [*blocks, (targets, hidden, hidden), (targets, hidden, VOCABULARY)]]

    def chain() -> float:
        began_s = time.perf_counter()
        for _ in range(micro_batches):
            for x, weight, _ in operands:
                torch.nn.functional.linear(x, weight)
            for x, weight, grad in reversed(operands):
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    return chain


def row_beside_bert(case: tuple[int, int, str], micro_batches: int, repeats: int) -> list[str]:
    """The cells of one case: residues a second, model TFLOP/s, speed relative to the products alone, transformers'."""
    timed = build_step(str(ROOT), micro_batches, LENGTHS, flags_of(*case))
    theirs = bert_steps(*case, micro_batches)
    steps = {"ours": lambda: timed()[0], "chain": product_chain(*case, micro_batches), **theirs}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + repeats):
        for name, step in steps.items():
            times[name].append(step())
    batch, config = packed_row(), parse(flags_of(*case))[0]
    flops = micro_batches * model_flops(config.model, VOCABULARY, batch.num_tokens, batch.num_pairs, batch.num_targets)
    ours_s, chain_s = (statistics.median(times[name][WARM_UP:]) for name in ("ours", "chain"))
    return [speed(times["ours"], micro_batches), f"{flops / ours_s / 1e12:.3f}", f"{100 * chain_s / ours_s:.0f} %",
            *(speed(times[name], micro_batches) for name in theirs)]


def row_beside_checkout(flags: Sequence[str], micro_batches: int, repeats: int, other: Path) -> list[str]:
    """The cells of a case: the speeds of both checkouts, their ratio, and the relative difference of the losses."""
    times: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    with (step_in_a_process(ROOT, micro_batches, flags) as ours,
          step_in_a_process(other, micro_batches, flags) as theirs):
        for number in range(WARM_UP + repeats):
            for which in (0, 1) if number % 2 else (1, 0):
                elapsed_s, loss = (ours, theirs)[which]()
                times[which].append(elapsed_s)
                losses[which].append(loss)
    medians = [statistics.median(each[WARM_UP:]) for each in times]
    pairs = [second / first for first, second in zip(*times, strict=True)][WARM_UP:]
    apart = max(abs(first - second) / second for first, second in zip(*losses, strict=True))
    return [*(speed(each, micro_batches) for each in times), f"{medians[1] / medians[0]:.3f}", spread(pairs, ".3f"),
            f"{apart:.0e}"]


@contextmanager
def step_in_a_process(checkout: Path, micro_batches: int, flags: Sequence[str]) -> Iterator[TimedStep]:
    """A context with a function that takes a step of a checkout in a separate process, which is idle in between."""
    program = [sys.executable, str(ROOT / "benchmarks" / "checkout_step.py"), str(checkout), str(micro_batches),
               ",".join(map(str, LENGTHS)), *flags]
    with subprocess.Popen(program, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        ask, answers = process.stdin, process.stdout
        assert ask is not None and answers is not None

        def step() -> tuple[float, float]:
            time.sleep(0.02)  # until the threads of the other process, which spin for a while, are asleep
            print("step", file=ask, flush=True)
            answer = answers.readline().split()
            if not answer:
                raise SystemExit(f"the process of {checkout} has ended")
            return float(answer[0]), float(answer[1])

        yield step


def speed(times: Sequence[float], micro_batches: int) -> str:
    """Residues a second after the warm-up, median and quartiles as text."""
    return spread([micro_batches * RESIDUES / elapsed_s for elapsed_s in times[WARM_UP:]], ".0f")


def spread(values: Sequence[float], form: str) -> str:
    """Median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def processor() -> str:
    """The name of the GPU or, without one, of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Time every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--micro-batches", type=int, default=1, help="rows whose gradients are summed in a step")
    parser.add_argument("--hidden", type=int, nargs="+", choices=(256, 1024), default=[256, 1024])
    parser.add_argument("--large", action="store_true", help="the published 16 x 1024 model as well")
    parser.add_argument("--beside", type=Path, help="another checkout of the project, back to the first edition's")
    parser.add_argument("--flags", help="with --beside: the program's, of the one case that is then timed")
    arguments = parser.parse_args()
    if arguments.flags is not None and not arguments.beside:
        parser.error("give --beside CHECKOUT with --flags")
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{arguments.micro_batches} micro-batches a step\n")
    columns = ["residues/s (quartiles)", "model TFLOP/s", "of a bare chain of its products"]
    if find_spec("transformers") is not None:
        columns += [f"transformers: {way}, {name}" for name in BATCHES for way in THEIR_WAYS]
    if arguments.beside:
        columns = ["residues/s (quartiles)", f"{arguments.beside.name}: residues/s", "speed, ratio of medians",
                   "of pairs (quartiles)", "losses apart"]
    print(f"| layers x hidden | precision | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 2)}|", flush=True)
    if arguments.flags is not None:
        cells = row_beside_checkout(shlex.split(arguments.flags), arguments.micro_batches, arguments.repeats,
                                    arguments.beside.resolve())
        print(f"| {arguments.flags} | | {' | '.join(cells)} |")
        return
    for layers, hidden in [*((4, hidden) for hidden in arguments.hidden), *([(16, 1024)] if arguments.large else [])]:
        for precision in ("", "--bf16"):
            case = layers, hidden, precision
            cells = (row_beside_checkout(flags_of(*case), arguments.micro_batches, arguments.repeats,
                                         arguments.beside.resolve())
                     if arguments.beside else row_beside_bert(case, arguments.micro_batches, arguments.repeats))
            print(f"| {layers} x {hidden} | {precision.strip('-') or 'fp32'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
