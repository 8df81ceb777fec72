"""A text file, or a folder of them: one document a file, in the order of their paths."""

import mmap
import os

import numpy as np

from gpt_jax.data.hashing import digest, file_digests, unit_hash


class TextFiles:
    """Documents that are files.

    Args:
      root: the folder, or the one file.
      paths: the files, sorted.
      cache_dir: where content digests are remembered.
    """

    random_access = True

    def __init__(self, root: str, paths: list[str], cache_dir):
        self.label = root
        self._paths = paths
        folder = root if os.path.isdir(root) else os.path.dirname(root)
        self._names = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
        self.fingerprint = digest("text", self._names, _digests(paths, cache_dir))

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        """The path of file i."""
        return self._paths[i]

    def raw(self, i: int):
        """The bytes of file i, mapped rather than read: a corpus may be one huge file."""
        try:
            with open(self._paths[i], "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return b""
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(error) from None

    def unit_hashes(self) -> np.ndarray:
        """float64[len], by path within the folder."""
        return np.array([unit_hash(name) for name in self._names])


def unreadable(error: OSError) -> ValueError:
    """The error of a file that cannot be read."""
    return ValueError(f"data.path: {error.filename!r} cannot be read: {error.strerror}")


def _digests(paths, cache_dir):
    try:
        return file_digests(paths, cache_dir)
    except OSError as error:
        raise unreadable(error) from None
