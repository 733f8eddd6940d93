"""Profiles some steps: a trace for chrome://tracing or Perfetto, and a table of operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.config import LoggingConfig
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.parallel.mesh import Mesh

_ROWS = 15  # of the table that is printed


class StepProfiler:
    """Profiles the steps from `--profile-step-start` to before `--profile-step-end`, counted from this run's first.

    Each of `--profile-ranks` writes the trace SAVE/profile/rank_N.json.gz and the table of all operations rank_N.txt;
    rank 0, if it is one of them, also logs what took longest. The last profiled step waits for the device. Raises
    ConfigError for a rank that does not exist.
    """

    def __init__(self, config: LoggingConfig, save: str | None, mesh: Mesh, log: Log) -> None:
        if config.profile and max(config.profile_ranks) >= mesh.world.size:
            raise ConfigError(f"--profile-ranks {max(config.profile_ranks)} is not among the {mesh.world.size} ranks "
                              f"of this run; give ranks below {mesh.world.size}")
        is_profiled = config.profile and mesh.world.rank in config.profile_ranks
        self._steps = range(config.profile_step_start, config.profile_step_end) if is_profiled else range(0)
        self._stem = Path(save or "") / "profile" / f"rank_{mesh.world.rank}"
        self._device, self._log = mesh.device, log
        self._number, self._profile = 0, profile(activities=_activities(mesh.device)) if is_profiled else None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for the run's next step and whatever follows it (log, evaluation, save)."""
        number, self._number = self._number, self._number + 1
        if self._profile is None or number not in self._steps:
            yield
            return
        if number == self._steps[0]:
            self._profile.start()
        yield
        if number == self._steps[-1]:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._profile.stop()
            self._write()

    def close(self) -> None:
        """Log a line if the run ended before the last step to profile."""
        if self._steps and self._number <= self._steps[-1]:
            self._log.line(f"no profile: the run ended after {self._number} steps, and --profile-step-end is "
                           f"{self._steps.stop}")

    def _write(self) -> None:
        assert self._profile is not None
        rows = _table(self._profile, len(self._steps))
        try:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            self._stem.with_suffix(".txt").write_text("\n".join(rows) + "\n")
            self._profile.export_chrome_trace(f"{self._stem}.json.gz")
        except OSError as error:
            self._log.line(f"note: the profile cannot be written to {self._stem.parent} ({error.strerror or error})")
            return
        self._log.line("\n".join([*rows[:_ROWS + 1], f"profile of {len(self._steps)} steps: {self._stem}.txt, and for "
                                  f"chrome://tracing or ui.perfetto.dev {self._stem}.json.gz"]))


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _table(profiled: profile, num_steps: int) -> list[str]:
    """A header and a line per operation, slowest first, by its own time: on the GPU if there is one, else on the CPU.
    """
    events = profiled.key_averages()
    is_on_gpu = any(event.self_device_time_total for event in events)
    own_ms = {event.key: (event.self_device_time_total if is_on_gpu else event.self_cpu_time_total) / num_steps / 1e3
              for event in events}
    total_ms = sum(own_ms.values()) or 1.0
    where = "GPU" if is_on_gpu else "CPU"
    lines = [f"{'ms a step':>10} {'share':>7} {'calls':>8}  operation, by its own time on the {where}"]
    for event in sorted(events, key=lambda event: -own_ms[event.key]):
        own = own_ms[event.key]
        lines.append(f"{own:>10.2f} {own / total_ms:>7.1%} {event.count / num_steps:>8.1f}  {event.key}")
    return lines
