"""Files of lines that are added to, also where the disk is full.  Starts no JAX."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def without_room() -> Iterator[None]:
    """Goes on where what is done within finds no room on the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise


class LineFile:
    """Adds lines, from any thread; those that find no room on the disk wait in memory for it.

    Args:
      path: The file; what it holds stays.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""
        self._lock = threading.RLock()

    def write(self, line: str) -> None:
        """Adds a line, which others can read from now on if there is room."""
        with self._lock, without_room():
            self._waiting += f"{line}\n".encode()
            self._write()

    def _write(self) -> None:
        while self._waiting:  # a file may take a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Returns when all lines are on the disk.

        Raises:
          OSError: There is no room for them.
        """
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Adds what waits.

        Raises:
          OSError: There is no room for it.
        """
        with self._lock:
            try:
                self._write()
            finally:
                self._file.close()
