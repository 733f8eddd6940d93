"""In which order a pipeline rank computes: lists of actions, one for each of the published schedules.

Every rank's list names the same micro-batches in the same order, forward and backward, so that messages between two
ranks need no labels. On one rank with one stage each list is forward, backward, forward, backward …
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "input", "weights"]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one of the rank's stages.

    A "backward" pass is whole; zero-bubble cuts it into "input", what the stage before waits for, and "weights".
    """

    kind: Kind
    micro_batch: int
    stage: int = 0


def forward_only(num_ranks: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """All forward passes: micro-batches in groups of as many as there are ranks, each group through all stages."""
    return [Action("forward", micro_batch, stage) for micro_batch, stage
            in _in_groups(num_ranks, num_stages, num_micro_batches)]


def one_forward_one_backward(rank: int, num_ranks: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """1F1B, on several stages a rank the interleaved one (Narayanan et al., 2021, arXiv 2104.04473).

    With several stages the micro-batches are a multiple of the ranks.
    """
    forwards = forward_only(num_ranks, num_stages, num_micro_batches)
    backwards = [Action("backward", action.micro_batch, num_stages - 1 - action.stage) for action in forwards]
    ahead = num_ranks - rank - 1
    if num_stages > 1:
        ahead = 2 * ahead + (num_stages - 1) * num_ranks
    ahead = min(ahead, len(forwards))
    actions = forwards[:ahead]
    for index, backward in enumerate(backwards):
        actions += forwards[ahead + index:ahead + index + 1]
        actions.append(backward)
    return actions


def zero_bubble(rank: int, num_ranks: int, num_micro_batches: int) -> list[Action]:
    """ZB-H1 (Qi et al., 2023, arXiv 2401.10241): as 1F1B, but weights' gradients are computed where a rank would wait.

    Rank r puts up to r of them off, so that no rank keeps more than the first one does.
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
