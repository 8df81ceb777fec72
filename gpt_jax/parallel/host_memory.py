"""How the C library hands memory to XLA:CPU.

XLA:CPU takes the buffers of a step from malloc and frees them after it. By default glibc gives
blocks of that size back to the kernel at once, so that every step faults all its pages in again;
docs/speed.md has what that costs.
"""

import ctypes
import sys

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets the process keep what it frees; True if the C library can (glibc).

    To be called before the first computation. The process then holds its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    settings = (
        (_M_ARENA_MAX, 1),  # other arenas are small mappings that large blocks do not fit in
        (_M_MMAP_MAX, 0),  # no mapping of its own for a large block: it would be unmapped at free
        (_M_TRIM_THRESHOLD, -1),  # the largest size: the heap never shrinks
        (_M_TOP_PAD, 1 << 28),
    )
    return all([mallopt(name, value) == 1 for name, value in settings])
