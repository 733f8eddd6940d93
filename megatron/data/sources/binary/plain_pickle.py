"""Unpickles plain data alone: containers, numbers, strings, bytes and NumPy arrays of them.

A pickle is a program, and one from elsewhere may be a hostile one. Here it finds no function but those below, builds no
NumPy type but the simple ones (a structured one can make numbers pass for addresses), hashes no container (nested
tuples take exponential time), and fills no more memory than some times its own size.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_HASHABLE = (str, bytes, int, float, type(None), np.generic)
_SIMPLE_KIND = re.compile(r"[biufcSUO][0-9]{1,9}")
_COPIES = 4  # all that pickled functions take, over the size of the pickle; more is a bomb
_Load = Callable[[Any], None]
_THEIRS: dict[int, _Load] = pickle._Unpickler.dispatch
_REFUSED = b"".join([pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.LONG4])  # not of plain data


def load_plain_pickle(data: bytes) -> Any:
    """What a pickle holds, if that is plain data; raises pickle.UnpicklingError for anything else or damage."""
    try:
        return _PlainUnpickler(data).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damage can raise nearly anything here
        raise pickle.UnpicklingError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


class _Kind:
    """A simple kind of number or string, as NumPy pickles its dtype: the kind first, its byte order by the state."""

    def __init__(self, name: str, align: object = False, copy: object = False) -> None:
        if not _SIMPLE_KIND.fullmatch(name):
            raise pickle.UnpicklingError(f"its array is of the kind {name[:40]!r}, which is not plain data")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        order, *structure = state[1:5]
        if any(part is not None for part in structure):
            raise pickle.UnpicklingError("it holds a structured array, which is not plain data")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose state is looked at before NumPy believes it."""

    def __setstate__(self, state: tuple) -> None:
        *_, shape, kind, is_fortran, data = state
        holds_objects = isinstance(data, list)
        item_size = 1 if holds_objects else kind.dtype.itemsize
        if (holds_objects != kind.dtype.hasobject or min(shape, default=0) < 0
                or len(data) != math.prod(shape) * item_size):
            raise pickle.UnpicklingError("it holds an array that does not fit its data")
        super().__setstate__((1, shape, kind.dtype, is_fortran, data))


def _empty_array(subtype: object, shape: object, kind: object) -> np.ndarray:
    """The empty array that NumPy's pickles fill afterwards; they never ask for another one."""
    return np.empty(0, dtype=np.int8).view(_Array)


def _from_buffer(data: bytes, kind: _Kind, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _scalar(kind: _Kind, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _no_bytes() -> bytes:
    """How pickles before protocol 3 spell empty bytes; with a number it would allocate them."""
    return b""


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    return text.encode("latin-1")


def _make_set(items: Iterable[Any] = ()) -> set:
    return set(_hashable(items))


def _make_frozenset(items: Iterable[Any] = ()) -> frozenset:
    return frozenset(_hashable(items))


def _make_dict(pairs: Iterable[Any] = ()) -> dict:
    pairs = list(pairs)
    _hashable(key for key, _ in pairs)
    return dict(pairs)


def _hashable(keys: Iterable[Any]) -> list[Any]:
    """The same, where each is a number or a string; raises UnpicklingError otherwise."""
    keys = list(keys)
    for key in keys:
        if not isinstance(key, _HASHABLE):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} for a key, which is not plain data")
    return keys


def _with_keys(load: _Load, keys: slice) -> _Load:
    """`load` for a stack whose items `keys` can be hashed."""
    def load_checked(unpickler: "_PlainUnpickler") -> None:
        _hashable(unpickler.stack[keys])
        load(unpickler)
    return load_checked


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python: that in C fills gigabytes of memory on a five-byte pickle (a huge memo index)."""

    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._budget = _COPIES * (len(data) + 1024)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name]
        except KeyError:
            words = " ".join(f"{module}.{name}".split())[:200]
            raise pickle.UnpicklingError(f"it asks for {words}, which is not plain data") from None

    def _call(self) -> None:
        arguments = self.stack.pop()
        self._budget -= 1 + sum(len(argument) for argument in arguments if hasattr(argument, "__len__"))
        if self._budget < 0:
            raise pickle.UnpicklingError("it unpacks to many times its size")
        self.stack[-1] = self.stack[-1](*arguments)

    def _set_state(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Kind | _Array):
            raise pickle.UnpicklingError("it sets the state of what is no array")
        self.stack[-1].__setstate__(state)

    def _read_bytearray(self) -> None:
        """Like that of `pickle`, which fills as much memory as the pickle asks for before it reads."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {opcode: load for opcode, load in _THEIRS.items() if opcode not in _REFUSED} | {
        pickle.REDUCE[0]: _call, pickle.BUILD[0]: _set_state, pickle.BYTEARRAY8[0]: _read_bytearray,
        pickle.SETITEM[0]: _with_keys(_THEIRS[pickle.SETITEM[0]], slice(-2, -1)),
        pickle.SETITEMS[0]: _with_keys(_THEIRS[pickle.SETITEMS[0]], slice(None, None, 2)),
        pickle.DICT[0]: _with_keys(_THEIRS[pickle.DICT[0]], slice(None, None, 2)),
        pickle.ADDITEMS[0]: _with_keys(_THEIRS[pickle.ADDITEMS[0]], slice(None)),
        pickle.FROZENSET[0]: _with_keys(_THEIRS[pickle.FROZENSET[0]], slice(None)),
    }


_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _make_dict,
    ("builtins", "set"): _make_set, ("builtins", "frozenset"): _make_frozenset, ("builtins", "bytes"): _no_bytes,
    ("_codecs", "encode"): _latin1,
    # Only ever named as the kind of array to make; as a class it could be called.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}
