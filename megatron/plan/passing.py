"""What is held of the tensors that pass between the pieces of a stage, each counted once however many pieces keep it.

A stage holds the message that comes to it, and the gradient of the one that it sends, as wholes: what its pieces take
of these costs nothing more.
"""

from dataclasses import dataclass
from functools import cache
from itertools import count

from megatron.plan.rank import PlannedStage

_ROTATION = -1


@dataclass(frozen=True)
class Passing:
    """Bytes of tensors that pass by or come to one piece.

    `in_forward`: held while it computes. `kept`: for its own backward pass and those of the pieces before it.
    `in_backward`: gradients beside those of its own, with both messages to and from the next stage; `in_message`:
    whether those of its hidden states, and of the skips that it gives, lie in there.
    """

    in_forward: int
    kept: int
    in_backward: int
    in_message: tuple[bool, bool]


@dataclass(frozen=True)
class StagePassing:
    """`pieces` in their order. `kept`: from a forward pass to its backward pass, with both messages.

    `in_packing`: held while several tensors become one message. `in_unpacking`: new when several gradients become one.
    """

    pieces: list[Passing]
    kept: int
    in_packing: int
    in_unpacking: int


@cache  # sharding and the number of micro-batches change nothing here
def passing_of(planned: PlannedStage) -> StagePassing:
    """That of a stage, whose pieces are gone through with a number for each tensor that passes."""
    numbers = count()
    hidden = x0 = next(numbers)
    skips = [next(numbers) for _ in range(planned.num_received - 1 - planned.has_x0)]
    sizes = dict.fromkeys([hidden, *skips], 0)  # they lie in the message
    kept: set[int] = set()

    def held(tensors: set[int]) -> int:
        return planned.received + sum(sizes.get(tensor, planned.hidden_bytes) for tensor in tensors)

    def there() -> set[int]:
        # Whoever calls the blocks holds what they begin with until the last is done, whether it is mixed in or not.
        return kept | {hidden, x0, *skips}

    walk: list[tuple[int, int, list[int], list[int]]] = []
    for number, piece in enumerate(planned.pieces):
        if planned.part.is_first and number == 0:
            walk.append((0, 0, [], []))
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
        walk.append((held(in_forward), held(kept), skips, given))
        skips = skips + given
    pieces = []
    for number, (in_forward_bytes, kept_bytes, passed_by, given) in enumerate(walk):
        above = planned.pieces[number + 1:]
        waiting = planned.has_x0 * any(piece.num_blocks for piece in above) + len(set(passed_by) - set(skips))
        in_backward = 2 * planned.sent + planned.hidden_bytes * waiting
        in_message = not above and not planned.part.is_last, not set(given).isdisjoint(skips)
        pieces.append(Passing(in_forward_bytes, kept_bytes, in_backward, in_message))
    in_packing = held(there()) + (planned.sent if planned.num_sent > 1 else 0)
    in_unpacking = planned.received if planned.num_received > 1 else 0
    return StagePassing(pieces, held(kept) + planned.sent, in_packing, in_unpacking)
