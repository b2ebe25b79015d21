"""What the host process does with memory."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Asks the C library to keep freed memory for the next allocation, for the whole process.

    On CPU, XLA allocates the temporary arrays of a program at every call. By default glibc takes
    large ones from the kernel and gives them back each time, and the kernel clears every page: a
    fifth of a training step of a small model. To be called before JAX starts its threads; memory
    that has been used once then stays with the process.

    Returns:
      Whether the C library could be asked (it is glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    largest = 2**31 - 1
    settings = ((_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, largest), (_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
