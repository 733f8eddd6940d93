"""Measures how long a save delays training, and how much memory it takes: `python benchmarks/checkpoints.py FOLDER`.

On several ranks: `python -m megatron.parallel.launch --standalone --nproc-per-node=2 benchmarks/checkpoints.py FOLDER
[flags of pretrain_tape.py, such as --data-parallel-sharding parameters]`. FOLDER is created, and removed at the end;
its disk is measured. The model is the preset proteinlm-200m with Adam's moments, 2.4 GB, in fp32. Synchronous and
asynchronous saves alternate; each is synced to the disk. Prints medians with the range: the seconds that `save` takes,
the seconds until the checkpoint is complete, and the peak memory of a rank above what it held before.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.own_memory import OwnMemory  # noqa: E402
from megatron.checkpoint.saving import Saver, parts_of  # noqa: E402
from megatron.config import CheckpointConfig  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.collectives import all_reduce_sum  # noqa: E402
from megatron.parallel.launch.environment import launched  # noqa: E402
from megatron.parallel.mesh import open_mesh  # noqa: E402
from megatron.train.step.engine import Engine, build_engine  # noqa: E402


def main(argv: list[str]) -> None:
    """Measure, and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=5)
    options, flags = parser.parse_known_args(argv)
    config, _ = parse(["--preset", "proteinlm-200m", *flags])
    with open_mesh(config.parallel, launched()) as mesh:
        log = Log(is_speaker=mesh.world.rank == 0)
        engine = build_engine(config, mesh, Vocab.from_file().padded_size(config.model))
        give_moments(engine)
        parts = parts_of(engine.model.parameters, engine.optimizer.state())
        held = sum(part.tensor.numel() * part.tensor.element_size() for part in parts.values())
        log.line(f"{mesh.world.size} rank(s), {held / 1e9:.2f} GB on each, torch {torch.__version__}")
        savers = {way: Saver(CheckpointConfig(save=options.folder, async_save=way == "async", keep_checkpoints=1), mesh,
                             None, Log(is_speaker=False), 0) for way in ("plain", "async")}
        taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in savers}
        for number in range(1, 2 * options.repeats + 3):
            way = list(savers)[number % 2]
            all_reduce_sum(torch.zeros(1), mesh.world)
            with OwnMemory() as memory:
                began_s = time.perf_counter()
                savers[way].save(number, parts, {"iteration": number})
                held_up_s = time.perf_counter() - began_s
                savers[way].finish()
            taken[way].append((held_up_s, time.perf_counter() - began_s, memory.most_gb - memory.before_gb))
        for way, values in taken.items():
            held_up, until_there, _ = zip(*values[1:], strict=True)  # the first also allocates the buffers
            log.line(f"{way:6} held up {shown(held_up)} s, there after {shown(until_there)} s, "
                     f"memory +{max(grown for _, _, grown in values):.2f} GB")
        for saver in savers.values():
            saver.close()
        if mesh.world.rank == 0:
            shutil.rmtree(options.folder)


def give_moments(engine: Engine) -> None:
    """Give the optimizer random moments, so that no steps are needed."""
    engine.optimizer.load_state({f"{kind}/{name}": torch.rand_like(parameter) if kind != "step" else torch.tensor(1.0)
                                 for name, parameter in engine.model.parameters.items()
                                 for kind in ("exp_avg", "exp_avg_sq", "step")})


def shown(seconds: tuple[float, ...]) -> str:
    """The median and the range as text."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main(sys.argv[1:])
