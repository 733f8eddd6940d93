"""Maps files into memory without keeping them open, so that hundreds of corpora fit the limit of 1,024 open files.

A mapping needs no open descriptor, but Python's `mmap`, and so `np.memmap`, keeps one (optional since Python 3.13).
Therefore this calls mmap of the C library.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, uint8, read-only; unmapped when the last array that views them is gone. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # mmap refuses empty files
            return np.empty(0, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit: a thread may still be reading then.
    weakref.finalize(memory, libc.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(memory), dtype=np.uint8)
    array.flags.writeable = False
    return array
