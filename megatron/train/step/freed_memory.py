"""What becomes of freed memory on CPUs: the C library keeps it for the next step.

By itself glibc maps large tensors anew and gives back the end of its heap, so that each step has the kernel clear the
same pages again (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TO_KEEP = 2**31 - 1  # bytes at the end of the heap: an int's most
_LARGEST_KEPT = 2**25  # bytes of a tensor: glibc's most


def keep_freed_memory() -> bool:
    """From now on this process keeps what is freed; whether the C library can: glibc alone."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no such handle
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _MOST_TO_KEEP) and mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT))
