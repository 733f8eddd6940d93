"""Tries values of flags of pretrain_tape.py, one run for each, and says which are best:

    python tools/sweep.py --output runs/sweep --vary lr 3e-4 1e-3 3e-3 --vary adam-beta2 0.95 0.98 --seeds 1 2 \\
        -- --preset demo --data-path runs/data/small_text_document

The flags of all trials come after --. Each trial has its own folder below --output. If it is stopped (Ctrl-C, SIGTERM)
or killed, run the same command again: finished trials are not repeated, and an interrupted one resumes from its
checkpoint. With longer lists, it tries the new values.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.metrics import loss_name  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.log import Log, exit_status  # noqa: E402
from megatron.parallel.launch.environment import launched  # noqa: E402
from megatron.study.curves import unlike  # noqa: E402
from megatron.study.one_precision import with_one_precision  # noqa: E402
from megatron.study.outcome import as_table, edges, outcomes  # noqa: E402
from megatron.study.record import SweepRecord, held  # noqa: E402
from megatron.study.running import LOG, Sweep  # noqa: E402
from megatron.study.sampling import SAMPLERS, optuna_module, plan  # noqa: E402
from megatron.study.settings import Space  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The sweep's own flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the trials and results")
    flags.add_argument("--vary", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"),
                       help="a flag without its dashes, and its values (true and false for a switch); repeatable")
    flags.add_argument("--seeds", nargs="+", metavar="N", help="run each setting with each of these as --seed")
    flags.add_argument("--early-stop", type=int, nargs="?", const=0, metavar="STEP",
                       help="stop a trial whose loss at an evaluation, from STEP on, is worse than the median of the "
                       "others' (at least two) at that step, or not finite")
    flags.add_argument("--sampler", choices=SAMPLERS, default="grid",
                       help="how to choose settings (default: grid, all of them)")
    flags.add_argument("--trials", type=int, metavar="N", help="number of settings of the grid to try (default: all)")
    flags.add_argument("--metric", default="valid", metavar="KIND",
                       help="the loss that decides: valid, valid_ema (of the weight average), valid/NAME of one "
                            "corpus, test or train (default: valid)")
    flags.add_argument("--jobs", type=int, default=1, metavar="N",
                       help="trials at once, each on its share of the GPUs or cores (default: 1)")
    return flags


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 at the end, or stopped; 1 where trials failed; 2 for a mistake of the user's."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return exit_status(lambda: sweep(parser().parse_args(argv[:at]), tuple(argv[at + 1:])))


def sweep(given: argparse.Namespace, base: tuple[str, ...]) -> int:
    """Run what is left of a sweep and say what came out; the exit status. Raises a UserError."""
    launch = launched()
    if launch.size > 1 and not launch.speaks():
        return ConfigError.exit_status
    if launch.size > 1:
        raise ConfigError(f"a sweep is one process, and {launch.launcher} started {launch.size}; start one: "
                          "srun --ntasks=1")
    if not given.vary:
        raise ConfigError("--vary is missing; give a flag and its values, such as --vary lr 3e-4 1e-3 3e-3")
    for name in ("trials", "jobs"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be 1 or greater")
    if given.sampler != "grid" and given.trials is None:
        raise ConfigError(f"--sampler {given.sampler} needs --trials: how many settings to try")
    space = Space(tuple(name for name, *_ in given.vary), tuple(tuple(values) for _, *values in given.vary),
                  tuple(given.seeds or [None]), base)
    space.check(given.metric)
    if given.sampler == "optuna":
        optuna_module()  # before anything is written
    log = Log()
    with held(given.output, log.line) as lock:
        record = SweepRecord(given.output, space, given.metric)
        space.check_files(setting for setting in space.settings() if record.is_left(setting))
        space = with_one_precision(space, record, log.line)
        planned = plan(given.sampler, space, record, given.trials)
        running = Sweep(space, record, given.metric, early_stop=given.early_stop, lock=lock.fileno(), tell=log.line,
                        environments=environments(given.jobs))
        is_done = running.run(planned.upcoming, planned.num_done, planned.num_trials)
        record.write_table()
        for result in running.failed:
            log.line(f"note: {result.trial} failed ({result.note}; {given.output / result.trial / LOG}): the same "
                     "command tries it again")
        _tell(record, space, given.metric, is_done, log)
    return int(bool(running.failed))


def environments(num_jobs: int) -> list[Mapping[str, str]]:
    """What trials that run side by side have of this machine's GPUs, or cores."""
    if num_jobs == 1:
        return [{}]
    import torch  # slow to import, and only these need it

    if num_gpus := torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": seen[job % num_gpus]} for job in range(num_jobs)]
    share = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}] * num_jobs


def _tell(record: SweepRecord, space: Space, metric: str, is_done: bool, log: Log) -> None:
    found, note = outcomes(record.all()), unlike(record.measured_on())
    log.line(f"\n{loss_name(metric)} in nats, the {'best' if note is None else 'lowest'} first:\n\n{as_table(found)}\n")
    if any(one.losses for one in found):
        from megatron.study.sweep_picture import draw_sweep  # matplotlib: slow to import, needed once

        draw_sweep(found, f"{loss_name(metric)} (nats a masked residue)", record.folder / "sweep.png")
        log.line(f"picture: {record.folder / 'sweep.png'}, table: {record.folder / 'sweep.csv'}")
    if note is not None:
        log.line(note)
    if not is_done:
        log.line("stopped: the same command goes on")
    elif note is None and found and found[0].is_finished:
        for line in edges(found):
            log.line(line)
        log.line(f"best: {' '.join(space.varied_words(tuple(found[0].values.values())))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
