"""Measures memory and time of converting a large checkpoint: `python benchmarks/conversions.py FOLDER [--layers 36]`.

FOLDER is created, and removed at the end. The checkpoint has ProteinLM 3B's widths and Adam's moments. With all 36
layers it takes 34 GB, and half as much again in fp16 with fp32 masters; FOLDER holds two of them at a time. Each
conversion runs in a separate process. Prints its peak memory (VmHWM, which includes mapped files), and elapsed and CPU
seconds.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.checkpoint.contents import Checkpoint, StoredTensor, one_piece  # noqa: E402
from megatron.checkpoint.convert import megatron_v2  # noqa: E402
from megatron.checkpoint.convert.conversion import convert  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.model.protein_model import ProteinModel  # noqa: E402

# (source, format of the target, target, tensor-parallel size of its files); sources are removed after conversion.
STEPS = [("made", "sharded", "a", 1), ("a", "whole", "b", 1), ("b", "megatron-v2", "c", 2),
         ("c", "megatron-v2", "d", 1)]


def main(argv: list[str]) -> None:
    """Write the checkpoint, and convert it in several steps, which print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.step is not None:
        one_step(options.folder, *STEPS[options.step])
        return
    options.folder.mkdir(parents=True)
    try:
        megatron_v2.write(imagined(options.layers), options.folder / "made", tensor=4)
        for number, (source, *_) in enumerate(STEPS):
            subprocess.run([sys.executable, __file__, str(options.folder), "--step", str(number)], check=True)
            shutil.rmtree(options.folder / source)
    finally:
        shutil.rmtree(options.folder)


def one_step(folder: Path, source: str, saver: str, target: str, tensor: int) -> None:
    """Make one conversion, and print what it took."""
    began_s = time.perf_counter()
    convert(folder / source, folder / target, "auto", saver, tensor=tensor, pipeline=1, iteration=None, vocab_size=None,
            log=Log(is_speaker=False))
    took_s = time.perf_counter() - began_s
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    size = sum(file.stat().st_size for file in (folder / target).rglob("*") if file.is_file())
    times, memory = os.times(), int(line.split()[1]) / 2**10
    print(f"{source} to {saver}, tensor {tensor}: {size / 1e9:.1f} GB written, at most {memory:.0f} MiB of memory, "
          f"{took_s:.0f} s, {times.user:.0f} s of CPU and {times.system:.0f} s of the system's", flush=True)


def imagined(num_layers: int) -> Checkpoint:
    """An artificial checkpoint in fp16 with fp32 masters, whose tensors are generated when they are read."""
    config, _ = parse(["--preset", "proteinlm-3b", "--num-layers", str(num_layers)])
    with torch.device("meta"):
        model = ProteinModel(config.model, config.precision, Vocab.from_file().padded_size(config.model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    moments = {f"{kind}/{name}": _numbers(shape)
               for kind in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    moments |= {f"step/{name}": _numbers(()) for name in shapes}
    state = {"config": config.as_dict() | {"fp16": True}, "loss_scale": [1.0, 2.0, 0.0],
             "progress": {"iteration": 5, "consumed_samples": 10}}
    return Checkpoint(Path("imagined"), 5, {name: _numbers(shape) for name, shape in shapes.items()}, moments, state)


def _numbers(shape: tuple[int, ...]) -> StoredTensor:
    return one_piece(shape, torch.float32, lambda box: torch.full([part.stop - part.start for part in box], 1.5))


if __name__ == "__main__":
    main(sys.argv[1:])
