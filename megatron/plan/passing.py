"""Memory of the tensors that pass between the pieces of a stage; each counts once, however many pieces keep it.

The message that a stage receives, and the gradient of the one that it sends, are held as wholes, so the tensors in them
cost nothing in addition.
"""

from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import NamedTuple

from megatron.plan.rank import PlannedStage

_ROTATION = -1


@dataclass(frozen=True)
class Passing:
    """Bytes of passing tensors around one piece's passes."""

    in_forward: int  # held during its forward pass
    kept: int  # for the backward passes of this piece and those before it
    in_backward: int  # gradients of other passing tensors, and both messages to and from the next stage
    in_message: tuple[bool, bool]  # whether gradients of hidden states, and of skips, are in the messages


@dataclass(frozen=True)
class StagePassing:
    """Bytes of passing tensors in a stage."""

    pieces: list[Passing]  # in their order
    kept: int  # from a forward pass to its backward pass, with both messages
    in_packing: int  # held while several tensors are packed into one message
    in_unpacking: int  # allocated when their gradients are packed into one message


class _Forward(NamedTuple):
    """What the forward pass of one piece shows; tensors are known by numbers."""

    in_forward: int  # bytes of passing tensors that are held
    kept: int  # bytes kept for backward passes so far
    passed_by: list[int]  # skips that exist and that the piece does not take
    given: list[int]  # skips that it gives


@cache  # sharding and the number of micro-batches change nothing here
def passing_of(planned: PlannedStage) -> StagePassing:
    """The passing tensors of a stage, found by going through its pieces with a number for each tensor."""
    numbers = count()
    hidden = x0 = next(numbers)
    skips = [next(numbers) for _ in range(planned.num_received - 1 - planned.has_x0)]
    sizes = dict.fromkeys([hidden, *skips], 0)  # they are part of the message
    kept: set[int] = set()

    def held(tensors: set[int]) -> int:
        return planned.received + sum(sizes.get(tensor, planned.hidden_bytes) for tensor in tensors)

    def there() -> set[int]:
        # The caller of the blocks holds the embeddings until the last block is done, even if no block takes them.
        return kept | {hidden, x0, *skips}

    walk: list[_Forward] = []
    for number, piece in enumerate(planned.pieces):
        if planned.part.is_first and number == 0:
            walk.append(_Forward(0, 0, [], []))
            hidden = x0 = next(numbers)
            continue
        takes = [hidden]
        in_forward = there()
        if piece.num_blocks:
            num_taken = len(piece.kept_inputs) - 3
            taken, skips = skips[len(skips) - num_taken:], skips[:len(skips) - num_taken]
            takes += [_ROTATION, x0, *taken]
            in_forward.add(_ROTATION)
            sizes[_ROTATION] = piece.kept_inputs[1]
        kept |= {tensor for tensor, size in zip(takes, piece.kept_inputs, strict=True) if size}
        hidden = next(numbers)
        given = [hidden if is_hidden else next(numbers) for is_hidden in piece.given]
        walk.append(_Forward(held(in_forward), held(kept), skips, given))
        skips = skips + given
    in_packing = held(there()) + (planned.sent if planned.num_sent > 1 else 0)
    in_unpacking = planned.received if planned.num_received > 1 else 0
    return StagePassing(_with_gradients(planned, walk, set(skips)), held(kept) + planned.sent, in_packing, in_unpacking)


def _with_gradients(planned: PlannedStage, walk: list[_Forward], sent: set[int]) -> list[Passing]:
    """The passing tensors of each piece, with their gradients; `sent`: the skips that go to the next stage."""
    pieces = []
    for number, piece in enumerate(walk):
        above = planned.pieces[number + 1:]
        waiting = planned.has_x0 * any(other.num_blocks for other in above) + len(set(piece.passed_by) - sent)
        in_message = not above and not planned.part.is_last, not sent.isdisjoint(piece.given)
        pieces.append(Passing(piece.in_forward, piece.kept, 2 * planned.sent + planned.hidden_bytes * waiting,
                              in_message))
    return pieces
