"""A run from start to end, restarted from its last checkpoint when steps go wrong (`--on-spike rewind`)."""

import gc
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.claim import Claim
from megatron.checkpoint.store import iterations
from megatron.config import Config
from megatron.errors import DivergedError
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Mesh
from megatron.train.guards.faults import Faults
from megatron.train.guards.guard import HELP, RewindError
from megatron.train.guards.suspects import write_suspects
from megatron.train.loop import train
from megatron.train.observation.observers import check_observers, observed
from megatron.train.setup.resume import going_on
from megatron.train.setup.run import Run, build
from megatron.train.stop import StopRequests


def train_to_its_end(config: Config, mesh: Mesh, log: Log, requests: StopRequests, claim: Claim | None,
                     keep: Callable[[int], None] | None) -> Run:
    """Builds a run and trains it; builds it again from its last checkpoint whenever its guard raises RewindError.

    Returns the run as it ended. `claim`: on rank 0, the right to write into `--save`. `keep`: called once with the
    iteration at which this start begins. Raises a UserError.
    """
    if log.is_speaker:
        check_observers(config.logging)
    faults = Faults(config, mesh.world)
    suspect, run = None, build(config, mesh, log)
    farthest, num_in_vain = 0, 0  # the latest step found wrong so far, and rewinds since then that got no farther
    if keep is not None:
        keep(run.state.iteration)
    with observed(run.config, mesh, log) as observers:
        while True:
            try:
                train(run, requests, claim, faults, suspect, observers)
                return run
            except RewindError as found:
                last = found.window.last_step
                is_progress = last > farthest or found.is_again  # steps that go wrong twice alike are no device's fault
                farthest, num_in_vain = max(farthest, last), 0 if is_progress else num_in_vain + 1
                if not found.is_again and num_in_vain > config.guards.most_spikes:
                    raise DivergedError(f"steps up to {farthest} went wrong {num_in_vain + 1} times, different ones "
                                        f"each time, so a device or its memory fails; {HELP}") from None
                left_out, num_rewinds = _left_out(run, found)
                suspect = None if found.is_again else found.window
            config = _from_last_checkpoint(run)
            del run  # the next one needs its memory
            gc.collect()
            run = build(config, mesh, log, left_out, num_rewinds)


def _left_out(run: Run, found: RewindError) -> tuple[tuple[tuple[int, int], ...], int]:
    """The samples to leave out after this rewind, and the number of rewinds that left some out; logs the decision.

    Raises DivergedError where --most-spikes allows no more.
    """
    window, state, most = found.window, run.state, run.config.guards.most_spikes
    steps = f"steps {window.first_step} to {window.last_step}"
    if not found.is_again:
        run.log.line(f"going back to the last checkpoint, to see whether {steps} go wrong again")
        return state.left_out, state.num_rewinds
    where = write_suspects(run, window.first_step, window.rows)
    if state.num_rewinds >= most:
        raise DivergedError(f"{steps} went wrong twice{where}; the run has left out rows {most} times, as often as "
                            f"--most-spikes allows; {HELP}")
    first, last = run.state.sample_at(window.rows.start), run.state.sample_at(window.rows.stop - 1)
    run.log.line(f"{steps} went wrong twice, so the data or the settings are the cause{where}; going back to the last "
                 f"checkpoint and leaving them out, {state.num_rewinds + 1} of {most} times")
    return (*state.left_out, (first, last + 1)), state.num_rewinds + 1


def _from_last_checkpoint(run: Run) -> Config:
    """The configuration that resumes the run from its last checkpoint, or without one starts it as before."""
    save = run.config.checkpoint.save
    assert save is not None, "--on-spike rewind needs it"
    return going_on(run.config) if all_gather_object(bool(iterations(Path(save))), run.mesh.world)[0] else run.config
