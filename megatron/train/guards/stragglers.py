"""Which rank holds up the others by computing more slowly: what the log and the metrics say of each rank's time."""

import socket
import statistics
from collections.abc import Mapping, Sequence

from megatron.log import Log
from megatron.parallel.collectives import everyones
from megatron.parallel.mesh import Mesh
from megatron.train.step.meters import Reading

FACTOR = 1.2  # of the others' median, from which on a rank is named
LEAST_STEPS = 10  # over fewer, a moment in which a rank was held up would pass for a slow one


def slowest(compute_s: Sequence[float], stages: Sequence[int]) -> tuple[int, float] | None:
    """The rank that computes the longest beside the others of its stage, and its time by their median.

    `stages`: each rank's stage of the pipeline, for only ranks of one stage have the same work. None where no stage
    has two ranks.
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
    """Looks at the times of all ranks, which make this together; those of one are of no use to it."""

    def __init__(self, mesh: Mesh, log: Log) -> None:
        self._log = log
        places = everyones((socket.gethostname(), mesh.pipeline.rank), mesh.world)
        self._hosts, self._stages = zip(*places, strict=True)
        self._computed_s = [0.0] * len(places)  # since ranks were last compared
        self._num_steps = 0
        self._named: int | None = None
        self._is_warm = False

    def look(self, reading: Reading) -> Mapping[str, float | list[float] | None]:
        """What the metrics say of a reading; prints a line where a rank has become slow."""
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
        is_slow = self._is_warm and factor >= FACTOR  # the first steps of a process load and compile
        if is_slow and rank != self._named:
            its_ms = 1000 * self._computed_s[rank] / self._num_steps
            self._log.line(
                f"note: rank {rank} on {self._hosts[rank]} is slower than the others: in the last {self._num_steps} "
                f"steps it computed for {its_ms:.1f} ms each, {100 * (factor - 1):.0f} % more than the median of those "
                "with the same work, which wait for it; look at that host's clock rate, temperature and other programs")
        self._named, self._is_warm = rank if is_slow else None, True
        self._computed_s, self._num_steps = [0.0] * len(self._computed_s), 0
