"""Unpickles what torch.save pickles, and runs nothing of it.

It builds plain data, tensors that are read when they are asked for, `argparse.Namespace`s, and `PickledObject`s in the
place of the classes that checkpoints of Megatron and of torch.distributed.checkpoint are known to hold. It refuses
every other name.

torch.load(weights_only=True), as of torch 2.14, does not serve: it knows pickles of protocol 2 alone, reads whole into
memory what lies within another file or was saved before torch 1.6, and compares no checksum, so that damage loads as
wrong weights. Nor does torch.load with this unpickler as its `pickle_module`: it hands a TorchScript archive to
torch.jit.load, past the unpickler.
"""

import argparse
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron.checkpoint.contents import StoredTensor
from megatron.checkpoint.convert.torch_storage import Storage, view
from megatron.plain_pickle import PlainUnpickler, Readable, load

# Of these modules everything, and of others these names, stands for itself; nothing of them is imported or run.
_INERT_MODULES = {
    "megatron.fp16.loss_scaler", "megatron.fp16_deprecated.loss_scaler", "fp16.loss_scaler", "apex.amp.scaler",
    "apex.fp16_utils.loss_scaler", "megatron.optimizer.grad_scaler", "megatron.core.optimizer.grad_scaler",
    "megatron.model.enums", "megatron.core.enums", "megatron.core.transformer.enums", "torch.nn.init",
    "torch.nn.functional", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner",
    "megatron.core.rerun_state_machine", "megatron.core.optimizer.optimizer_config"}
_INERT_NAMES = {
    ("torch", "device"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch._C._nn", "gelu"),
    ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("signal", "Signals"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "PurePosixPath"), ("io", "BytesIO"), ("_io", "BytesIO"),
    ("builtins", "dict"), ("builtins", "list"), ("builtins", "int"), ("builtins", "float")}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8}
StorageOf = Callable[[str, torch.dtype, int], Storage]


@dataclass(eq=False)
class PickledObject:
    """In the place of an object: the name of its class, or function, and what its pickle gave it."""

    name: str
    arguments: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Inert:
    """In the place of a class or function, by its name; to call it gives a `PickledObject`."""

    name: str

    def __call__(self, *arguments: Any) -> PickledObject:
        return PickledObject(self.name, arguments)


def load_torch_pickle(file: Readable, limit: int, storage_of: StorageOf | None = None) -> Any:
    """What a pickle of at most `limit` bytes holds, with a `StoredTensor` in the place of each tensor.

    `storage_of`: the storage of a key, dtype and number of elements, where the pickle may name any. Raises
    pickle.UnpicklingError.
    """
    return load(_TorchUnpickler(file, limit, storage_of))


class _TorchUnpickler(PlainUnpickler):
    hashable = (*PlainUnpickler.hashable, PickledObject, Inert)

    def __init__(self, file: Readable, limit: int, storage_of: StorageOf | None) -> None:
        super().__init__(file, limit)
        self._storage_of = storage_of

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if (module, name) in _FOUND:
            return _FOUND[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _INERT_MODULES or (module, name) in _INERT_NAMES:
            return Inert(f"{module}.{name}")
        if module == "signal" and name in signal.Signals.__members__:  # Python 3.11.0 to 3.11.3
            return PickledObject("signal.Signals", (name,))
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a pickle names."""
        if self._storage_of is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it names something outside of it that is no storage of a tensor")
        _, dtype, key, _, num_elements, *view_of = pid
        if any(part is not None for part in view_of):
            raise pickle.UnpicklingError("it has a view of a storage, as only the first versions of torch wrote")
        is_known = isinstance(dtype, torch.dtype) and isinstance(key, str | int) and type(num_elements) is int
        if not is_known or num_elements < 0:
            raise pickle.UnpicklingError("it names a storage by what is not its type, key and size")
        return self._storage_of(str(key), dtype, num_elements)

    def set_state(self, made: Any, state: Any) -> None:
        """Fill what was made, without asking it."""
        if isinstance(made, argparse.Namespace):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise pickle.UnpicklingError("it holds a namespace that is none")
            vars(made).update(state)
        elif isinstance(made, PickledObject):
            made.state = state
        elif not isinstance(made, dict | StoredTensor):  # notes on versions and splits, which are not wanted
            super().set_state(made, state)

    def _new(self) -> None:
        arguments = self.stack.pop()
        maker = self.stack[-1]
        if not (isinstance(maker, Inert) or maker is _namespace) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it makes an object of what is no class that is known here")
        self.stack[-1] = self.make(maker, arguments)

    def _new_by_name(self) -> None:
        named = self.stack.pop()
        arguments = self.stack.pop()
        if not isinstance(named, dict):
            raise pickle.UnpicklingError("it makes an object of what are no arguments")
        self.stack.append((*arguments, named) if named else arguments)
        self._new()

    dispatch = PlainUnpickler.dispatch | {pickle.NEWOBJ[0]: _new, pickle.NEWOBJ_EX[0]: _new_by_name}


def _namespace(*arguments: Any) -> argparse.Namespace:
    if arguments:
        raise pickle.UnpicklingError("it makes a namespace in a way that pickles do not")
    return argparse.Namespace()


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
            *unused: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("it makes a tensor of what is no storage")
    return view(storage, storage.dtype, offset, shape, strides)


def _tensor_of_untyped(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
                       requires_grad: bool, hooks: Any, dtype: torch.dtype, *unused: Any) -> StoredTensor:
    return view(storage, dtype, offset, shape, strides)


def _parameter(tensor: StoredTensor, *unused: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise pickle.UnpicklingError("it holds a parameter that is no tensor")
    return tensor


def _with_attributes(rebuild: Any, kind: Any, arguments: tuple, state: Any) -> StoredTensor:
    """A tensor on which attributes were set, as Megatron sets how it is split."""
    if rebuild not in (_tensor, _tensor_of_untyped, _parameter):
        raise pickle.UnpicklingError("it makes a tensor in a way that is not known here")
    return rebuild(*arguments)


def _member(kind: Any, name: Any) -> PickledObject:
    """A member of an enumeration, as Python 3.11.0 to 3.11.3 pickles it."""
    if not isinstance(kind, Inert) or not isinstance(name, str):
        raise pickle.UnpicklingError("it asks for builtins.getattr, of what is no enumeration")
    return PickledObject(kind.name, (name,))


def _size(sizes: Any) -> tuple[int, ...]:
    return tuple(sizes)


def _defaults(factory: Any = None) -> dict:
    """A collections.defaultdict, for those who only look up what is there."""
    return {}


_FOUND: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _namespace,
    ("types", "SimpleNamespace"): _namespace,
    ("builtins", "getattr"): _member,
    ("__builtin__", "getattr"): _member,
    ("collections", "defaultdict"): _defaults,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_untyped,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
}
