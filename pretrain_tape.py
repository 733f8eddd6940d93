"""Pretrain a masked protein language model on packed proteins: `python pretrain_tape.py --help`.

`examples/pretrain_tape.sh` shows a whole run. Exits with 0 at the end, or when a signal asked it to stop and it has
saved; with 1 where a rank failed, or lost the others; with 2 and one line on a mistake of the user, 3 where steps go
wrong again and again, 4 where the last checkpoint could not be saved; with 130 after a second Ctrl-C.
"""

import sys
from collections.abc import Sequence
from functools import partial

from megatron.train.signals import leave_when_asked

if __name__ == "__main__":
    leave_when_asked()  # before the imports, which take seconds

from megatron.checkpoint.claim import claimed
from megatron.checkpoint.newest import saved_flags
from megatron.config import Config
from megatron.config.command_line import Resolved, left_open, resolve
from megatron.config.telling.idle import notes
from megatron.config.telling.listing import listing, notice
from megatron.errors import ConfigError, UserError
from megatron.log import Log, hush_matplotlib, take_any_text
from megatron.parallel.launch.environment import Launch, check_launch, launched
from megatron.parallel.launch.failure import interrupted, refused, report
from megatron.parallel.launch.leaving import leave
from megatron.parallel.layout import check_layout
from megatron.parallel.mesh import grid_sizes, open_mesh
from megatron.parallel.sameness import check_same_flags
from megatron.train.rewinding import train_to_its_end
from megatron.train.setup.configuration import keep_configuration, write_configuration
from megatron.train.state import BatchSizes
from megatron.train.stop import StopRequests, interruption


def main(argv: Sequence[str]) -> int:
    """Run the program on `argv`; returns the exit status."""
    take_any_text()
    hush_matplotlib()
    launch = Launch()
    try:
        launch = launched()
        taken = left_open(argv, saved_flags)
        resolved = resolve(argv, taken)
        config = resolved.config
        if resolved.given.write_config is not None:
            if launch.speaks():
                write_configuration(resolved)
            return 0
        requests = StopRequests(config.training.exit_duration_in_mins)
        check_launch(launch)
        _check_sizes(config, launch)
    except (UserError, OSError) as error:
        return refused(error, launch)
    try:
        if config.parallel.dry_run:
            from megatron.plan.dry_run import dry_run  # as slow to import as torch

            print(dry_run(config))
            return 0
        _train(resolved, notice(taken), launch, requests)
    except KeyboardInterrupt:  # the second; the first asks to stop
        return interrupted(interruption(config.checkpoint.save), launch)
    except Exception as error:
        return report(error, launch)
    return 0


def _train(resolved: Resolved, said: str | None, launch: Launch, requests: StopRequests) -> None:
    """Join the other ranks, train, and leave a report; `said`: of flags taken from a checkpoint."""
    config = resolved.config
    with open_mesh(config.parallel, launch, partial(check_same_flags, config.sections())) as mesh:
        log = Log(is_speaker=mesh.world.rank == 0)
        log.line(listing(config, resolved.given.always_so))
        if said is not None:
            log.line(said)
        for line in notes(config, resolved.given.said, resolved.given.of_preset):
            log.line(line)
        with claimed(config.checkpoint.save, mesh, log) as claim, requests.listening():
            keep = None if claim is None else partial(keep_configuration, resolved)
            run = train_to_its_end(config, mesh, log, requests, claim, keep)
            if config.checkpoint.save and log.is_speaker and not run.is_other_evaluated:
                from megatron.study.report import leave_report  # matplotlib: slow to import, needed once

                leave_report(run)


def _check_sizes(config: Config, launch: Launch) -> None:
    num_ranks = launch.size
    if config.parallel.dry_run:
        num_ranks = config.parallel.dry_run_ranks
        if launch.size > 1:
            raise ConfigError(f"--dry-run builds any layout in one process, and {launch.size} were started; start one")
    check_layout(config, num_ranks)
    BatchSizes(config.training, grid_sizes(config.parallel, num_ranks)["data"])  # raises where they do not divide


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
