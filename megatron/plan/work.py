"""How much operations compute, and how many bytes they read and write."""

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class WorkCounter:
    """`flops` are those of matrix products and attention, `moved` the bytes that go through memory.

    An operation moves each tensor that it is given and that it gives once; views, new memory and collectives move
    nothing. `of_weights` are those of the moved bytes whose tensors have one of the `shapes`, transposed or not.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]] = ()) -> None:
        self.flops = self.moved = self.of_weights = 0
        self._shapes = {tuple(sorted(shape)) for shape in shapes}

    def count(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        """Count an operation that is done."""
        if func.namespace != "aten" or func.is_view or "empty" in func.__name__:
            return
        tensors = {id(item): item for item in tree_iter((args, kwargs, results)) if isinstance(item, Tensor)}
        for tensor in tensors.values():
            size = tensor.numel() * tensor.element_size()
            self.moved += size
            if self._shapes and tuple(sorted(tensor.shape)) in self._shapes:
                self.of_weights += size
        if func._overloadpacket in flop_registry:
            with unset_fake_temporarily():  # real boundaries of proteins, that it may read, are to stay so
                self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=results)
