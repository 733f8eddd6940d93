"""Finds the rank that slows the others down, from the time that each rank computes and waits."""

import socket
import statistics
from collections.abc import Mapping, Sequence

from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Mesh
from megatron.train.step.meters import Reading

FACTOR = 1.2  # times the median of the others: a rank that takes at least this long is reported
LEAST_STEPS = 10  # over fewer steps one short delay would make a rank look slow


def slowest(compute_s: Sequence[float], stages: Sequence[int]) -> tuple[int, float] | None:
    """The rank that computes longest compared with the others of its pipeline stage, and its time / their median.

    `stages`: each rank's pipeline rank, since only ranks of one stage have the same work. None if no stage has two.
    """
    found = []
    for stage in set(stages):
        ranks = [rank for rank, its_stage in enumerate(stages) if its_stage == stage]
        if len(ranks) > 1:
            rank = max(ranks, key=lambda rank: compute_s[rank])
            others = statistics.median(compute_s[other] for other in ranks if other != rank)
            found.append((rank, compute_s[rank] / max(others, 1e-9)))
    return max(found, key=lambda one: one[1], default=None)


class Stragglers:
    """Compares the ranks' times at log events. A collective: all ranks create this together."""

    def __init__(self, mesh: Mesh, log: Log) -> None:
        self._log = log
        places = all_gather_object((socket.gethostname(), mesh.pipeline.rank), mesh.world)
        self._hosts, self._stages = zip(*places, strict=True)
        self._computed_s = [0.0] * len(places)  # since ranks were last compared
        self._num_steps = 0
        self._named: int | None = None
        self._is_warm = False

    def look(self, reading: Reading) -> Mapping[str, float | list[float] | None]:
        """The fields for metrics.jsonl on the ranks' times, {} with one rank; logs a line when a rank becomes slow."""
        if not reading.ranks:
            return {}
        self._computed_s = [so_far + new.compute_s for so_far, new in zip(self._computed_s, reading.ranks, strict=True)]
        self._num_steps += reading.num_steps
        if self._num_steps >= LEAST_STEPS:
            self._compare()
        compute_ms, waited_ms = ([round(1000 * seconds / reading.num_steps, 3) for seconds in of_ranks]
                                 for of_ranks in zip(*reading.ranks, strict=True))
        rank, factor = slowest([one.compute_s for one in reading.ranks], self._stages) or (None, None)
        return {"compute_ms": compute_ms, "exposed_communication_ms": waited_ms,
                "exposed_communication": sum(waited_ms) / max(sum(compute_ms) + sum(waited_ms), 1e-9),
                "slowest_rank": rank, "slowest_rank_factor": factor}

    def _compare(self) -> None:
        rank, factor = slowest(self._computed_s, self._stages) or (0, 0.0)
        is_slow = self._is_warm and factor >= FACTOR  # the first steps of a process also load and compile
        if is_slow and rank != self._named:
            its_ms = 1000 * self._computed_s[rank] / self._num_steps
            self._log.line(
                f"note: rank {rank} on {self._hosts[rank]} is slower than the others: in the last {self._num_steps} "
                f"steps it computed for {its_ms:.1f} ms each, {100 * (factor - 1):.0f} % more than the median of those "
                "with the same work, which wait for it; look at that host's clock rate, temperature and other programs")
        self._named, self._is_warm = rank if is_slow else None, True
        self._computed_s, self._num_steps = [0.0] * len(self._computed_s), 0
