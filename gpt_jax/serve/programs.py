"""What is compiled takes memory, and requests decide how much is.

Every size of a batch, length of a cache and set of rules is a program of its own, and one of 30
layers takes some 40 MiB with what JAX keeps beside it. There are thousands, so they must not all
stay: whoever asks for one after another would fill the memory.
"""

import ctypes
import gc
import logging

import jax
import jax.monitoring

_LOG = logging.getLogger("gpt_jax.serve")
# Compiled programs may take so much, those of the start not counted.
MAX_BYTES = 2 << 30
# What one takes where the C library does not tell what is in use.
_GUESSED = 16 << 20
_EVENT = "/jax/core/compile/backend_compile_duration"


class Programs:
    """Counts programs, and forgets all when they take too much. Of one thread.

    Attributes:
      count: Programs that were compiled, or read from the cache on disk, since `start`.
    """

    def __init__(self, max_bytes: int | None = None):
        """
        Args:
          max_bytes: Those compiled since `start` may take so much; None: MAX_BYTES.
        """
        self._max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self.count = self._seen = self._forgotten = 0
        self._before: int | None = None
        self._counts = False

    def start(self) -> None:
        """Begins to count: what was compiled before takes nothing of `max_bytes`."""
        _give_back()
        self._before, self._counts = _in_use(), True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> None:
        """Counts no more, if it did."""
        if self._counts:
            jax.monitoring.unregister_event_duration_listener(self._listen)
        self._counts = False

    def trim(self) -> bool:
        """Forgets all programs if they take too much; what is needed is compiled again.

        While nothing new is compiled it costs nothing.

        Returns:
          Whether it did.
        """
        if self.count == self._seen:
            return False
        self._seen = self.count
        forgets = self._taken() > self._max_bytes
        if forgets:
            jax.clear_caches()
            gc.collect()  # traces refer to each other
            _LOG.info("%d compiled programs are forgotten", self.count - self._forgotten)
            self._forgotten = self.count
        _give_back()
        return forgets

    def _taken(self) -> int:
        now = _in_use()
        if now is None or self._before is None:
            return (self.count - self._forgotten) * _GUESSED
        return now - self._before

    def _listen(self, event: str, duration: float, **_) -> None:
        self.count += event == _EVENT


def _give_back() -> None:
    """Gives pages that are free to the kernel; takes 2 to 40 ms.

    A heap that never shrinks (parallel.host_memory) would keep what the compiler took: several
    times what it leaves, and more with each program whose remains lie in between.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """Of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _in_use() -> int | None:
    """Bytes that were taken from malloc and not given back, without JAX's arrays.

    None where the C library does not tell. What the kernel counts would be of no use: the heap
    never shrinks (parallel.host_memory).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    arrays = sum(array.nbytes for array in jax.live_arrays("cpu"))
    return info.uordblks + info.hblkhd - arrays
