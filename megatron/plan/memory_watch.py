"""How many bytes tensors without values, fake ones or those on `meta`, would hold: followed storage by storage."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class MemoryWatch(TorchDispatchMode):
    """Within this context `current` is the bytes of the tensors that operations have given, and are still there.

    Only those without values count: others are data on the host. What an operation takes for itself and gives back
    before it ends is not seen. `at_growth` is called when more is held than before, and when an operation has changed
    one of the tensors that it was given, which are in `changing` then; `counters` with each operation, its arguments,
    those by name, and the tensors that it was given and gave.
    """

    def __init__(self, counters: Sequence[Callable[[Any, Any, Any, list[Tensor], list[Tensor]], None]] = ()) -> None:
        super().__init__()
        self._counters = counters
        self.at_growth: Callable[[], None] = lambda: None
        self.current = 0
        self.changing: list[Tensor] = []
        self._sizes: dict[int, int] = {}  # by the address of the storage
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> "MemoryWatch":
        # FSDP2 gives memory back and takes it again by resizing storages, which is no operation.
        self._resize = torch.UntypedStorage.resize_
        watch, resize = self, self._resize

        def watched_resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            watch._set_size(storage)
            return result

        torch.UntypedStorage.resize_ = watched_resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and follow what it gives. A value that the host asks of a tensor without values is 1."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what counts are the operations on its local tensor
        kwargs = kwargs or {}
        given = _tensors((*args, *kwargs.values()))
        if given and all(map(_has_values, given)):
            with unset_fake_temporarily():  # data on the host, that is real, is to stay so
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if len({tensor.is_meta for tensor in given}) == 2:  # on one device, as the mode of fake tensors sees to as well
            moved_args, moved_kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            results = func(*moved_args, **moved_kwargs)
        else:
            results = func(*args, **kwargs)
        new = _tensors((results,))
        for count in self._counters:
            count(func, args, kwargs, given, new)
        for tensor in new:
            if not _has_values(tensor):
                self._follow(tensor.untyped_storage())
        if func._schema.is_mutable:
            self.changing = given
            self.at_growth()
            self.changing = []
        return results

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = 0
        self._ends[address] = weakref.ref(storage, lambda _: self._forget(address))
        self._set_size(storage)

    def _set_size(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            return
        self.current += size - self._sizes[address]
        self._sizes[address] = size
        self.at_growth()

    def _forget(self, address: int) -> None:
        self.current -= self._sizes.pop(address)
        del self._ends[address]


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of the tensors, of a DTensor those that are here; None counts 0."""
    here = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in here)


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
