"""The outcome of a sweep: its settings from the best to the worst, and hints for the next sweep."""

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
    """A setting and the results of its seeds; `values`: by flag."""

    values: dict[str, str]
    results: tuple[TrialResult, ...]

    @property
    def is_finished(self) -> bool:
        """Whether the trials of all seeds finished."""
        return all(result.outcome == FINISHED for result in self.results)

    @property
    def counted(self) -> list[TrialResult]:
        """The results that count for the mean: those that finished or, if none did, those that have a loss at all."""
        known = [result for result in self.results if result.loss is not None]
        return [result for result in known if result.outcome == FINISHED] or known

    @property
    def losses(self) -> list[float]:
        """The losses of the results that count."""
        return [result.loss for result in self.counted if result.loss is not None]

    @property
    def mean(self) -> float:
        """The mean of the losses; infinity if there are none."""
        return float(np.mean(self.losses)) if self.losses else math.inf

    @property
    def spread(self) -> float | None:
        """The standard deviation of the losses (over n - 1); None for fewer than two."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else None


def outcomes(results: Sequence[TrialResult]) -> list[Outcome]:
    """The settings in `results`: first those whose seeds all finished, then the others, each by increasing loss."""
    groups: dict[tuple[str, ...], list[TrialResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.values.values()), []).append(result)
    found = [Outcome(group[0].values, tuple(group)) for group in groups.values()]
    return sorted(found, key=lambda one: (not one.is_finished, one.mean))


def tried(found: Sequence[Outcome]) -> dict[str, list[str]]:
    """The values of each flag that were tried, in increasing order if they are numbers."""
    names = found[0].values if found else ()
    return {name: in_order(list(dict.fromkeys(one.values[name] for one in found))) for name in names}


def edges(found: Sequence[Outcome]) -> list[str]:
    """A note for each numeric flag whose best value is the smallest or the largest that was tried."""
    lines = []
    for name, values in tried(found).items():
        best = found[0].values[name]
        if found[0].is_finished and len(values) > 1 and all(map(is_number, values)) and best in (values[0], values[-1]):
            side, more = ("smallest", "smaller") if best == values[0] else ("largest", "larger")
            lines.append(f"note: --{name} {best} is the {side} that was tried: widen its list, a {more} one may be "
                         "better")
    return lines


def as_table(found: Sequence[Outcome]) -> str:
    """A table of the settings, one a line."""
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
