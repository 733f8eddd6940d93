"""The pipeline schedules, simulated with messages that arrive in the order of sending."""

from collections import Counter, defaultdict

import pytest

from megatron.parallel.pipeline.schedules import Action, forward_only, one_forward_one_backward, zero_bubble

UNITS = {"forward": 1, "backward": 2, "input": 1, "weights": 1}


def lists(schedule, ranks, stages, micro_batches):
    if schedule == "zero-bubble":
        return [zero_bubble(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "forward":
        return [forward_only(ranks, stages, micro_batches)] * ranks
    return [one_forward_one_backward(rank, ranks, stages, micro_batches) for rank in range(ranks)]


def ways(action, rank, ranks, stages):
    """The channels from which an action takes its message and to which it gives one, None at the ends.

    A channel is its sender and its receiver, and whether it carries activations or gradients.
    """
    position, last = action.stage * ranks + rank, ranks * stages - 1
    before, after = (rank - 1) % ranks, (rank + 1) % ranks
    if action.kind == "forward":
        return (None if position == 0 else (before, rank, "activations"),
                None if position == last else (rank, after, "activations"))
    if action.kind == "weights":
        return None, None
    return (None if position == last else (after, rank, "gradients"),
            None if position == 0 else (rank, before, "gradients"))


def played(schedule, ranks, stages, micro_batches):
    """The time units that each rank is idle until its last action ends; fails where no rank can go on.

    Also sees to it that each message is the one that its receiver expects.
    """
    queues = [list(actions) for actions in lists(schedule, ranks, stages, micro_batches)]
    sent, free_at, busy = defaultdict(list), [0] * ranks, [0] * ranks
    while any(queues):
        progress = False
        for rank, queue in enumerate(queues):
            while queue:
                source, target = ways(queue[0], rank, ranks, stages)
                if source is not None and not sent[source]:
                    break
                action, arrived = queue.pop(0), 0
                if source is not None:
                    arrived, sender_stage, micro_batch = sent[source].pop(0)
                    wraps = rank == (0 if action.kind == "forward" else ranks - 1)
                    step = (1 if action.kind == "forward" else -1) * wraps
                    assert (micro_batch, sender_stage + step) == (action.micro_batch, action.stage)
                free_at[rank] = max(free_at[rank], arrived) + UNITS[action.kind]
                busy[rank] += UNITS[action.kind]
                if target is not None:
                    sent[target].append((free_at[rank], action.stage, action.micro_batch))
                progress = True
        assert progress, f"every rank waits: {[queue[:1] for queue in queues]}"
    assert not any(sent.values())
    return [end - work for end, work in zip([max(free_at)] * ranks, busy, strict=True)]


CASES = [("1f1b", ranks, 1, count) for ranks in (1, 2, 3, 4, 8) for count in (1, 2, 3, 5, 8, 16)]
CASES += [("zero-bubble", ranks, 1, count) for ranks in (2, 3, 4, 8) for count in (1, 2, 3, 5, 8, 16)]
CASES += [("1f1b", ranks, stages, ranks * groups) for ranks in (2, 3, 4) for stages in (2, 3) for groups in (1, 2, 4)]
CASES += [("forward", ranks, stages, count) for ranks in (1, 2, 4) for stages in (1, 3) for count in (1, 3, 4, 9)]


@pytest.mark.parametrize(("schedule", "ranks", "stages", "micro_batches"), CASES)
def test_no_rank_waits_for_ever_and_every_message_is_the_expected_one(schedule, ranks, stages, micro_batches):
    played(schedule, ranks, stages, micro_batches)


@pytest.mark.parametrize(("schedule", "ranks", "stages", "micro_batches"), CASES)
def test_every_pass_is_there_once_and_in_the_order_of_the_micro_batches(schedule, ranks, stages, micro_batches):
    kinds = {"forward": ["forward"], "zero-bubble": ["forward", "input", "weights"],
             "1f1b": ["forward", "backward"]}[schedule]
    for actions in lists(schedule, ranks, stages, micro_batches):
        assert Counter(actions) == Counter(Action(kind, number, stage) for kind in kinds
                                           for number in range(micro_batches) for stage in range(stages))
        for kind in kinds:
            for stage in range(stages):
                order = [action.micro_batch for action in actions if (action.kind, action.stage) == (kind, stage)]
                assert order == list(range(micro_batches))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bubbles_are_those_of_the_papers(ranks):
    micro_batches = 4 * ranks
    assert max(played("1f1b", ranks, 1, micro_batches)) == 3 * (ranks - 1)
    # As many passes when interleaved, each through half as many blocks.
    assert max(played("1f1b", ranks, 2, micro_batches)) == 3 * (ranks - 1)
    assert max(played("zero-bubble", ranks, 1, micro_batches)) == ranks - 1


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_keeps_more_micro_batches_than_the_first(schedule, ranks):
    for rank, actions in enumerate(lists(schedule, ranks, 1, 4 * ranks)):
        under_way = most = waiting = 0
        for action in actions:
            under_way += {"forward": 1, "backward": -1, "input": -1, "weights": 0}[action.kind]
            waiting += {"input": 1, "weights": -1}.get(action.kind, 0)
            most = max(most, under_way + waiting)
        assert most <= (ranks - rank if schedule == "1f1b" else ranks)


def test_on_one_rank_each_micro_batch_goes_back_at_once():
    assert [action.kind for action in one_forward_one_backward(0, 1, 1, 3)] == ["forward", "backward"] * 3
