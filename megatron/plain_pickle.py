"""Safe unpickling of plain data: containers, numbers, strings, bytes and NumPy arrays of them.

A pickle is a program, and one from an unknown source may be hostile. This unpickler therefore

- calls only the functions in `_PLAIN`;
- builds only simple NumPy dtypes (a structured dtype can pass numbers off as memory addresses);
- hashes only numbers and strings (hashing nested tuples can take exponential time);
- allocates at most a few times the pickle's own size.

A reader that expects more than plain data derives a class from `PlainUnpickler`.
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
_COPIES = 4  # the most that all function calls may take as arguments, in sizes of the pickle; more is a bomb
_Load = Callable[[Any], None]
_THEIRS: dict[int, _Load] = pickle._Unpickler.dispatch  # opcode to method
_REFUSED = b"".join([pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.LONG4])  # plain data needs none


class Readable(Protocol):
    """The file that a pickle is read from."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, or fewer at the end."""

    def readline(self) -> bytes:
        """The bytes up to the end of the line."""


def load_plain_pickle(data: bytes) -> Any:
    """The plain data in a pickle; raises pickle.UnpicklingError for anything else, and for damage."""
    return load(PlainUnpickler(io.BytesIO(data), len(data)))


def load(unpickler: "PlainUnpickler") -> Any:
    """The content of the unpickler's file; raises pickle.UnpicklingError for what it refuses, and for damage."""
    try:
        return unpickler.load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damage can raise nearly anything here
        raise pickle.UnpicklingError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


class _Kind:
    """Stands in for np.dtype: the dtype of a simple kind of number or string.

    NumPy pickles a dtype as a call with its kind, such as "f4", followed by a state that holds the byte order.
    """

    def __init__(self, name: str, align: object = False, copy: object = False) -> None:
        if not _SIMPLE_KIND.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds an array of dtype {name[:40]!r}, which is not plain data")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        order, *structure = state[1:5]
        if any(part is not None for part in structure):
            raise pickle.UnpicklingError("it holds a structured array, which is not plain data")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that checks that its shape, dtype and data agree before NumPy uses them."""

    def __setstate__(self, state: tuple) -> None:
        *_, shape, kind, is_fortran, data = state
        holds_objects = isinstance(data, list)
        item_size = 1 if holds_objects else kind.dtype.itemsize
        if (holds_objects != kind.dtype.hasobject or min(shape, default=0) < 0
                or len(data) != math.prod(shape) * item_size):
            raise pickle.UnpicklingError("it holds an array that does not fit its data")
        super().__setstate__((1, shape, kind.dtype, is_fortran, data))


def _empty_array(subtype: object, shape: object, kind: object) -> np.ndarray:
    """The empty array that a NumPy pickle creates first and then fills by its state; the arguments never vary."""
    return np.empty(0, dtype=np.int8).view(_Array)


def _from_buffer(data: bytes, kind: _Kind, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _scalar(kind: _Kind, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _no_bytes() -> bytes:
    """Stands in for bytes, which pickles before protocol 3 call without arguments for empty bytes.

    bytes(number) would allocate that many.
    """
    return b""


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, which pickles of protocol 2 call to make bytes."""
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
    """The keys as a list; raises UnpicklingError if one is of another type than `kinds`."""
    keys = list(keys)
    for key in keys:
        if not isinstance(key, kinds):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key, which is not plain data")
    return keys


def _with_keys(load: _Load, keys: slice) -> _Load:
    """`load`, preceded by a check that the items `keys` of the stack may be hashed."""
    def load_checked(unpickler: "PlainUnpickler") -> None:
        _hashable(unpickler.stack[keys], unpickler.hashable)
        load(unpickler)
    return load_checked


class _BoundedFile:
    """A file that raises UnpicklingError once more than `limit` bytes are read; `num_read` counts them."""

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
    """An unpickler that accepts plain data only; see the top of the file for what it refuses.

    `limit`: the longest pickle accepted, in bytes. It derives from Python's own unpickler because the C one can be made
    to allocate gigabytes by a pickle of five bytes (a huge memo index). A derived class can accept more: more names in
    `find_class`, more objects in `set_state`, more types of keys in `hashable`.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    hashable: tuple[type, ...] = _HASHABLE

    def __init__(self, file: Readable, limit: int) -> None:
        self._counted = _BoundedFile(file, limit)
        super().__init__(self._counted)
        self._spent = 0

    def find_class(self, module: str, name: str) -> Any:
        """The object to use for `module.name`; raises UnpicklingError if plain data does not need it."""
        try:
            return _PLAIN[module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name]
        except KeyError:
            words = " ".join(f"{module}.{name}".split())[:200]
            raise pickle.UnpicklingError(f"it asks for {words}, which is not plain data") from None

    def set_state(self, made: Any, state: Any) -> None:
        """Set the state of an object that the pickle made; raises UnpicklingError unless it is an array or a dtype."""
        if not isinstance(made, _Kind | _Array):
            raise pickle.UnpicklingError("it sets the state of something that is not an array")
        made.__setstate__(state)

    def make(self, maker: Callable[..., Any], arguments: tuple) -> Any:
        """The result of a function that the pickle calls; raises UnpicklingError if its calls take too much in all."""
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
        """Read a bytearray. The method that this replaces allocates whatever size the pickle claims, then reads."""
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
    # Appears only as an argument, the class of array to make. The class itself could be called by a hostile pickle.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
}
