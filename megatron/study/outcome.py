"""What came out of a sweep: its settings from the best to the worst, and what that means for the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.log import in_time
from megatron.study.record import FINISHED, TrialResult
from megatron.study.settings import in_order, is_number
from megatron.study.table import in_short, table


@dataclass(frozen=True)
class Outcome:
    """A setting with the results of its seeds, and of those that came to their end the loss: its mean, and the standard
    deviation over n - 1. Where none did, of those that have a loss, where they were stopped.
    """

    values: dict[str, str]
    results: tuple[TrialResult, ...]

    @property
    def is_finished(self) -> bool:
        """Whether all seeds came to their end."""
        return all(result.outcome == FINISHED for result in self.results)

    @property
    def counted(self) -> list[TrialResult]:
        """The results that the mean is of."""
        known = [result for result in self.results if result.loss is not None]
        return [result for result in known if result.outcome == FINISHED] or known

    @property
    def losses(self) -> list[float]:
        """Those that the mean is of."""
        return [result.loss for result in self.counted if result.loss is not None]

    @property
    def mean(self) -> float:
        """Of the losses; infinite where there is none."""
        return float(np.mean(self.losses)) if self.losses else math.inf

    @property
    def spread(self) -> float | None:
        """The standard deviation of the losses; None for a single one."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else None


def outcomes(results: Sequence[TrialResult]) -> list[Outcome]:
    """The settings of `results`: those finished from the lowest loss on, then the others likewise."""
    groups: dict[tuple[str, ...], list[TrialResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.values.values()), []).append(result)
    found = [Outcome(group[0].values, tuple(group)) for group in groups.values()]
    return sorted(found, key=lambda one: (not one.is_finished, one.mean))


def tried(found: Sequence[Outcome]) -> dict[str, list[str]]:
    """The values of each flag that were tried, numbers in their order."""
    names = found[0].values if found else ()
    return {name: in_order(list(dict.fromkeys(one.values[name] for one in found))) for name in names}


def edges(found: Sequence[Outcome]) -> list[str]:
    """A line for each flag of numbers whose best value is the smallest or the largest that was tried."""
    lines = []
    for name, values in tried(found).items():
        best = found[0].values[name]
        if found[0].is_finished and len(values) > 1 and all(map(is_number, values)) and best in (values[0], values[-1]):
            side, more = ("smallest", "smaller") if best == values[0] else ("largest", "larger")
            lines.append(f"note: --{name} {best} is the {side} that was tried: widen its list, a {more} one may be "
                         "better")
    return lines


def as_table(found: Sequence[Outcome]) -> str:
    """The settings, one a line."""
    names = list(found[0].values) if found else []
    heads = [*names, "loss", "seeds", "steps", "residues", "time", "FLOPs", "outcome"]
    return table(heads, [_row(one) for one in found], len(names))


def _row(one: Outcome) -> list[str]:
    kinds = dict.fromkeys(result.outcome for result in one.results)
    said = ", ".join(f"{sum(result.outcome == kind for result in one.results)} {kind}" if len(kinds) > 1 else kind
                     for kind in kinds)
    loss = "none" if not one.losses else f"{one.mean:.4f}" + ("" if one.spread is None else f" ± {one.spread:.4f}")
    taken = []
    for name, form in (("steps", "{:,.0f}".format), ("residues", in_short), ("seconds", in_time), ("flops", in_short)):
        known = [value for result in one.counted if (value := getattr(result, name)) is not None]
        taken.append(form(float(np.mean(known))) if known else "?")
    return [*one.values.values(), loss, str(len(one.counted)), *taken, said]
