"""JSON lines: one document a row, found by an index of line offsets, so files may be huge."""

import io
import json
import os
from pathlib import Path

import numpy as np

from gpt_jax.data.hashing import digest, file_digests, mix64, unit_hash, write_atomically
from gpt_jax.data.text_files import unreadable

_BLOCK = 1 << 23


class JsonLines:
    """Documents that are rows of JSONL files.

    Args:
      root: the folder, or the one file.
      paths: the files, sorted.
      field: which field of a row holds its text.
      cache_dir: where content digests and line offsets are remembered.
    """

    random_access = True

    def __init__(self, root: str, paths: list[str], field: str, cache_dir):
        self.label = root
        self._paths = paths
        self._field = field
        folder = root if os.path.isdir(root) else os.path.dirname(root)
        self._names = [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]
        try:
            digests = file_digests(paths, cache_dir)
            self._lines = [
                _line_index(path, content, cache_dir)
                for path, content in zip(paths, digests, strict=True)
            ]
        except OSError as error:
            raise unreadable(error) from None
        self._ends = np.cumsum([len(lines) for lines in self._lines])
        self.fingerprint = digest("jsonl", field, self._names, digests)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, i: int) -> str:
        """Path and line (from 1) of row i."""
        file, row = self._locate(i)
        return f"{self._paths[file]}:{int(self._lines[file][row][2])}"

    def raw(self, i: int) -> bytes:
        """The text of row i, in UTF-8 where it can be written so.

        Raises:
          ValueError: the line is no JSON object, or has no text under the field.
        """
        file, row = self._locate(i)
        start, end, _ = map(int, self._lines[file][row])
        try:
            with open(self._paths[file], "rb") as handle:
                handle.seek(start)
                line = handle.read(end - start)
        except OSError as error:
            raise unreadable(error) from None
        # Bytes that are no UTF-8 pass through as half surrogates and come out as they went in, and
        # so does an escaped half surrogate: the caller's policy decides about either.
        try:
            record = json.loads(line.decode("utf-8", "surrogateescape"))
        except ValueError as error:
            raise ValueError(f"data.path: {self.name(i)} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"data.path: {self.name(i)} is a {type(record).__name__}, not a JSON object"
            )
        text = record.get(self._field)
        if not isinstance(text, str):
            problem = "no field" if text is None else f"a {type(text).__name__}, not text, in"
            raise ValueError(
                f"data.field: {self.name(i)} has {problem} {self._field!r}; "
                f"its fields are {', '.join(map(repr, record)) or 'none'}"
            )
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass")

    def unit_hashes(self) -> np.ndarray:
        """float64[len], by path within the folder and row."""
        parts = []
        for name, lines in zip(self._names, self._lines, strict=True):
            key = np.uint64(int(unit_hash(name) * 2**53))
            parts.append(mix64(mix64(np.arange(len(lines), dtype=np.uint64)) ^ key))
        return np.concatenate(parts) / 2.0**64

    def _locate(self, i: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, i, side="right"))
        return file, i - (int(self._ends[file - 1]) if file else 0)


def _line_index(path: str, content: str, cache_dir) -> np.ndarray:
    """int64[rows, 3]: start, end and number (from 1) of each line that is not blank; cached."""
    cached = Path(cache_dir) / "line_index" / f"{content}.npy"
    try:
        return np.load(cached, mmap_mode="r")
    except (OSError, ValueError):
        index = _index_lines(path)
    data = io.BytesIO()
    np.save(data, index)
    write_atomically(cached, data.getvalue())
    return index


def _index_lines(path: str) -> np.ndarray:
    ends, position, blank = [], 0, []
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position += len(block)
        ends.append(np.array([position]))
        ends = np.concatenate(ends).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        lengths = ends - starts
        for line in np.flatnonzero((lengths > 0) & (lengths < 2)):  # a lone carriage return
            file.seek(int(starts[line]))
            if not file.read(int(lengths[line])).strip():
                blank.append(line)
    keep = lengths > 0
    keep[blank] = False
    numbers = np.arange(1, len(ends) + 1)
    return np.stack([starts, ends, numbers], axis=1)[keep]
