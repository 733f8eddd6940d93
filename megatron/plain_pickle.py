"""Unpickles plain data alone: containers, numbers, strings, bytes and NumPy arrays of them.

A pickle is a program, and one from elsewhere may be a hostile one. Here it finds no function but those below, builds no
NumPy type but the simple ones (a structured one can make numbers pass for addresses), hashes no container (nested
tuples take exponential time), and fills no more memory than some times its own size. `PlainUnpickler` is to be built
upon where more than that is expected.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

_HASHABLE = (str, bytes, int, float, type(None), np.generic)
_SIMPLE_KIND = re.compile(r"[biufcSUO][0-9]{1,9}")
_COPIES = 4  # all that pickled functions take, over the size of the pickle; more is a bomb
_Load = Callable[[Any], None]
_THEIRS: dict[int, _Load] = pickle._Unpickler.dispatch
_REFUSED = b"".join([pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.LONG4])  # not of plain data


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""

    def readline(self) -> bytes:
        """Up to the end of a line."""


def load_plain_pickle(data: bytes) -> Any:
    """What a pickle holds, if that is plain data; raises pickle.UnpicklingError for anything else or damage."""
    return load(PlainUnpickler(io.BytesIO(data), len(data)))


def load(unpickler: "PlainUnpickler") -> Any:
    """What it reads; raises pickle.UnpicklingError for whatever it refuses, or damage."""
    try:
        return unpickler.load()
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


def _hashable(keys: Iterable[Any], kinds: tuple[type, ...] = _HASHABLE) -> list[Any]:
    """The same, where each is a number or a string; raises UnpicklingError otherwise."""
    keys = list(keys)
    for key in keys:
        if not isinstance(key, kinds):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} for a key, which is not plain data")
    return keys


def _with_keys(load: _Load, keys: slice) -> _Load:
    """`load` for a stack whose items `keys` can be hashed."""
    def load_checked(unpickler: "PlainUnpickler") -> None:
        _hashable(unpickler.stack[keys], unpickler.hashable)
        load(unpickler)
    return load_checked


class _BoundedFile:
    """A file of which no more than `limit` bytes are read, counted in `num_read`."""

    def __init__(self, file: Readable, limit: int) -> None:
        self._file, self._limit, self.num_read = file, limit, 0

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._limit + 1 - self.num_read)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline())

    def _counted(self, data: bytes) -> bytes:
        self.num_read += len(data)
        if self.num_read > self._limit:
            raise pickle.UnpicklingError(f"it is longer than {self._limit} bytes")
        return data


class PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python: that in C fills gigabytes of memory on a five-byte pickle (a huge memo index).

    `limit`: the longest pickle, in bytes. A derived class may find more names, give more objects their state, and allow
    keys of more kinds.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    hashable: tuple[type, ...] = _HASHABLE

    def __init__(self, file: Readable, limit: int) -> None:
        self._counted = _BoundedFile(file, limit)
        super().__init__(self._counted)
        self._spent = 0

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; raises UnpicklingError for all but those of plain data."""
        try:
            return _PLAIN[module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name]
        except KeyError:
            words = " ".join(f"{module}.{name}".split())[:200]
            raise pickle.UnpicklingError(f"it asks for {words}, which is not plain data") from None

    def set_state(self, made: Any, state: Any) -> None:
        """Let what was made be in `state`; raises UnpicklingError where it has none."""
        if not isinstance(made, _Kind | _Array):
            raise pickle.UnpicklingError("it sets the state of what is no array")
        made.__setstate__(state)

    def make(self, maker: Callable[..., Any], arguments: tuple) -> Any:
        """What a found function gives, as long as all of them together take no more than some times the pickle."""
        self._spent += 1 + sum(len(argument) for argument in arguments if hasattr(argument, "__len__"))
        if self._spent > _COPIES * (self._counted.num_read + 1024):
            raise pickle.UnpicklingError("it unpacks to many times its size")
        return maker(*arguments)

    def _call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    def _read_bytearray(self) -> None:
        """Like that of `pickle`, which fills as much memory as the pickle asks for before it reads."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {opcode: load for opcode, load in _THEIRS.items() if opcode not in _REFUSED} | {
        pickle.REDUCE[0]: _call, pickle.BUILD[0]: _build, pickle.BYTEARRAY8[0]: _read_bytearray,
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
