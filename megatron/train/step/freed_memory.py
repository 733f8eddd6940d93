"""Makes the C library keep freed memory for the next step, on CPUs.

By default glibc maps each large tensor anew and returns the end of its heap, so that in every step the kernel has to
clear the same pages again (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TO_KEEP = 2**31 - 1  # bytes at the end of the heap: the largest int
_LARGEST_KEPT = 2**25  # bytes of one allocation: glibc's maximum


def keep_freed_memory() -> bool:
    """Let this process keep freed memory from now on; returns whether the C library can (only glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no such handle
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _MOST_TO_KEEP) and mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT))
