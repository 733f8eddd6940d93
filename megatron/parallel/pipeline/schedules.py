"""Pipeline schedules: for each rank a list of actions in the order in which it computes them.

All ranks' lists have the micro-batches in the same order, forward and backward, so that messages between two ranks need
no labels. On one rank with one stage each list is forward, backward, forward, backward …
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "input", "weights"]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one of the rank's stages.

    Zero-bubble splits a "backward" pass into "input", whose gradient the previous stage waits for, and "weights".
    """

    kind: Kind
    micro_batch: int
    stage: int = 0  # among those of the rank


def forward_only(num_ranks: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """All forward passes: micro-batches in groups of `num_ranks`, each group through all stages of the rank."""
    return [Action("forward", micro_batch, stage) for micro_batch, stage
            in _in_groups(num_ranks, num_stages, num_micro_batches)]


def one_forward_one_backward(rank: int, num_ranks: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The 1F1B schedule, interleaved with several stages per rank (Narayanan et al., 2021, arXiv 2104.04473).

    With several stages the number of micro-batches is a multiple of `num_ranks`.
    """
    forwards = forward_only(num_ranks, num_stages, num_micro_batches)
    backwards = [Action("backward", action.micro_batch, num_stages - 1 - action.stage) for action in forwards]
    num_warmup = num_ranks - rank - 1
    if num_stages > 1:
        num_warmup = 2 * num_warmup + (num_stages - 1) * num_ranks
    num_warmup = min(num_warmup, len(forwards))
    actions = forwards[:num_warmup]
    for index, backward in enumerate(backwards):
        actions += forwards[num_warmup + index:num_warmup + index + 1]
        actions.append(backward)
    return actions


def zero_bubble(rank: int, num_ranks: int, num_micro_batches: int) -> list[Action]:
    """The ZB-H1 schedule (Qi et al., 2023, arXiv 2401.10241): 1F1B with weight gradients moved into the bubbles.

    Rank r defers at most r of them, so that no rank keeps more activations than the first one does.
    """
    actions: list[Action] = []
    num_done = 0
    plain = one_forward_one_backward(rank, num_ranks, 1, num_micro_batches)
    num_forwards = sum(action.kind == "forward" for action in plain)
    for action in plain:
        if action.kind == "forward":
            num_forwards -= 1
            actions.append(action)
            continue
        actions.append(Action("input", action.micro_batch))
        if action.micro_batch + 1 - num_done > rank or not num_forwards:
            actions.append(Action("weights", num_done))
            num_done += 1
    return actions + [Action("weights", micro_batch) for micro_batch in range(num_done, num_micro_batches)]


def _in_groups(num_ranks: int, num_stages: int, num_micro_batches: int) -> list[tuple[int, int]]:
    return [(micro_batch, stage) for start in range(0, num_micro_batches, num_ranks) for stage in range(num_stages)
            for micro_batch in range(start, min(start + num_ranks, num_micro_batches))]
