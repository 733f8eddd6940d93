"""Follows how many bytes tensors without values (fake tensors, or on `meta`) would take, storage by storage."""

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
    """A context in which `current` is the number of bytes of all live tensors that operations have returned.

    Tensors with values, which are data on the host, do not count, nor does temporary memory inside an operation.
    `at_growth`: called when memory is allocated, and when an operation has changed an input in place; then `changing`
    has its inputs. `counters`: called for each operation, with the operation, its positional and keyword arguments, and
    its input and output tensors.
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
        # FSDP2 frees and allocates memory by resizing storages, which is not an operation that is dispatched.
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
        """Run `func` and follow its outputs; reading a value of a tensor without values (`item()`) gives 1."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on its local tensor count instead
        kwargs = kwargs or {}
        given = _tensors((*args, *kwargs.values()))
        if given and all(map(_has_values, given)):
            with unset_fake_temporarily():  # real data on the host stays real
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if len({tensor.is_meta for tensor in given}) == 2:  # host data goes to `meta`, as in fake mode
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
    """The number of bytes of the tensors (of a DTensor, its local part); None counts 0."""
    here = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None)
    return sum(tensor.nbytes for tensor in here)


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
