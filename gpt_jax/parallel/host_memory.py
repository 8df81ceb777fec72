"""How the C library hands memory to XLA:CPU.

XLA:CPU takes the buffers of a step from malloc and frees them after it. By default glibc gives
blocks of that size back to the kernel at once, so that every step faults all its pages in again;
docs/speed.md has what that costs.
"""

import ctypes
import os
import re
import sys

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory(one_arena: bool = False) -> bool:
    """Lets the process keep what it frees; True if the C library can (glibc).

    To be called before the first computation and the first thread. The process then holds its peak
    until it ends. With one device this keeps the blocks of the first thread, however large, and
    those of all others together up to 64 MiB each, which is what their arena holds.

    Args:
      one_arena: What one thread frees any may get: less memory where several write a checkpoint by
        turns, but they wait for each other, and steps are slower.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    settings = [
        (_M_MMAP_MAX, 0),  # no mapping of its own for a large block: it would be unmapped at free
        (_M_TRIM_THRESHOLD, -1),  # the largest size: the heap never shrinks
        (_M_TOP_PAD, 1 << 28),
    ]
    # In one arena threads wait for each other, and search what compiling left behind. In one for
    # each thread, those that write checkpoints keep what no other gets. But threads of their own
    # compute for several devices, and their large blocks fit in no arena but the first.
    settings.append((_M_ARENA_MAX, 1 if one_arena or _num_devices() > 1 else 2))
    return all([mallopt(name, value) == 1 for name, value in settings])


def _num_devices() -> int:
    """How many devices XLA:CPU is asked to be."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(int(flag[1]) if flag else 1, int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1))
