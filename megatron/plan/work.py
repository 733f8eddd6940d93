"""How much the operations within a context compute, and how many bytes they read and write."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class WorkCounter(TorchDispatchMode):
    """Within this context `flops` are those of matrix products and attention, `moved` the bytes that go through memory.

    An operation moves each tensor that it is given and that it gives once; views, new memory and collectives move
    nothing. `of_weights` are those of the moved bytes whose tensors have one of the `shapes`, transposed or not.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]] = ()) -> None:
        super().__init__()
        self.flops = self.moved = self.of_weights = 0
        self._shapes = {tuple(sorted(shape)) for shape in shapes}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and count it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what counts are the operations on its local tensor
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            tensors = {id(item): item for item in tree_iter((args, kwargs, results)) if isinstance(item, Tensor)}
            for tensor in tensors.values():
                size = tensor.numel() * tensor.element_size()
                self.moved += size
                self.of_weights += size if tuple(sorted(tensor.shape)) in self._shapes else 0
            if func._overloadpacket in flop_registry:
                self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=results)
        return results
