"""Rows of a fixed length with their targets, segments and positions: what a model trains on.

B rows in a batch, T = seq_len.  Row r is stream[r * T : r * T + T + 1]; its first T tokens are
the inputs, its last T the targets, so every token but the first is a target exactly once.  A
segment begins at each end-of-text token: it belongs to the document that it begins.
"""

import bisect

import numpy as np

from gpt_jax.data.hashing import digest, file_digests
from gpt_jax.data.order import global_rows
from gpt_jax.data.stream import Stream

PADDING_ROW = -1


class Rows:
    """The rows of a token stream.

    Attributes:
      seq_len: T.
      num_tokens: targets in all rows, padding not counted.
      num_bytes: UTF-8 bytes of the text behind them, for bits per byte; 0 = not known.
      num_documents: documents in them; 0 = not known.
      skipped: names of documents left out as no UTF-8.
      fingerprint: changes whenever a token does.
    """

    def __init__(self, stream: Stream, seq_len: int, vocab_size: int, eos_id: int):
        self._stream = stream
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self.seq_len = seq_len
        self.num_tokens = stream.num_tokens - 1
        self.num_bytes = stream.num_bytes
        self.num_documents = stream.num_documents
        self.skipped = stream.skipped
        self.fingerprint = stream.fingerprint

    def __len__(self) -> int:
        return -(-self.num_tokens // self.seq_len)

    def batch(self, row_ids, epochs=None) -> dict[str, np.ndarray]:
        """Rows by number; a number outside [0, len) gives a row of padding.

        Args:
          row_ids: int[B].
          epochs: int[B]; nothing here depends on them.

        Returns:
          tokens, targets, positions, segment_ids (from 1 in each row; 0 is padding): int32[B, T];
          loss_mask: float32[B, T], 1.0 where a target counts.

        Raises:
          ValueError: the files were damaged since they were opened.
        """
        size = len(self)
        rows = [self.row_tokens(int(row)) if 0 <= row < size else None for row in row_ids]
        return make_batch(rows, self.seq_len, self._eos_id)

    def row_tokens(self, row: int) -> np.ndarray:
        """int[n] of up to T + 1 tokens."""
        tokens = self._stream.read(row * self.seq_len, (row + 1) * self.seq_len + 1)
        # A flipped bit in a stream too large to be checked whole must not train silently.
        if tokens.max() >= self._vocab_size:
            raise ValueError(
                f"tokens: {self._stream.folder} holds an id beyond the vocabulary of "
                f"{self._vocab_size}; the files are damaged, delete this folder to rebuild them"
            )
        return tokens


class TokenRows:
    """Rows that someone else made: .npy files of integers [rows, T + 1].  As `Rows` to its users.

    Args:
      paths: the files, sorted.
      seq_len: T.
      vocab_size, eos_id: of the tokenizer that made them; an eos_id of -1 finds no segments.
      cache_dir: where content digests are remembered.
      span: which part of the rows, as fractions [from, to).

    Raises:
      ValueError: a file is no .npy, or its shape or type is not that of token rows.
    """

    def __init__(self, paths, seq_len, vocab_size, eos_id, cache_dir, span=(0.0, 1.0)):
        self._paths = paths
        self._arrays = [_load_rows(path, seq_len) for path in paths]
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        ends = np.cumsum([len(array) for array in self._arrays]).tolist()
        self._starts = [0, *ends]
        self._first, self._stop = _cut(ends[-1], span[0]), _cut(ends[-1], span[1])
        self.seq_len = seq_len
        self.num_tokens = len(self) * seq_len
        self.num_bytes = 0
        self.num_documents = 0
        self.skipped = ()
        self.fingerprint = digest("rows", file_digests(paths, cache_dir), self._first, self._stop)

    def __len__(self) -> int:
        return self._stop - self._first

    def batch(self, row_ids, epochs=None) -> dict[str, np.ndarray]:
        """See `Rows.batch`.

        Raises:
          ValueError: an id is outside the vocabulary; names the file and the row.
        """
        size = len(self)
        rows = [self.row_tokens(int(row)) if 0 <= row < size else None for row in row_ids]
        return make_batch(rows, self.seq_len, self._eos_id)

    def row_tokens(self, row: int) -> np.ndarray:
        """int32[T + 1]."""
        row += self._first
        file = bisect.bisect_right(self._starts, row) - 1
        tokens = np.asarray(self._arrays[file][row - self._starts[file]])
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
            raise ValueError(
                f"data.path: {self._paths[file]}: row {row - self._starts[file]} holds id {bad}, "
                f"outside the tokenizer's vocabulary of {self._vocab_size}"
            )
        return tokens.astype(np.int32)


class SomeRows:
    """Few rows of many, drawn evenly; those of a smaller number are among those of a larger.

    As `Rows` to its users. What is drawn depends on the rows and the number alone, not on a run's
    seed, so that runs with as many tokens have the same ones.

    Args:
      rows: `Rows` or `TokenRows`.
      num_rows: at most len(rows).
    """

    def __init__(self, rows, num_rows: int):
        assert 1 <= num_rows <= len(rows), (num_rows, len(rows))
        self._rows = rows
        self._chosen = global_rows(0, len(rows), num_rows, 0)
        self.seq_len = rows.seq_len
        last = len(rows) - 1  # the one row that may be shorter
        missing = len(rows) * rows.seq_len - rows.num_tokens if last in self._chosen else 0
        self.num_tokens = num_rows * rows.seq_len - missing
        self.num_bytes = 0
        self.num_documents = 0
        self.skipped = rows.skipped
        self.fingerprint = digest("some rows", rows.fingerprint, num_rows)

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, row_ids, epochs=None) -> dict[str, np.ndarray]:
        """See `Rows.batch`."""
        inside = [0 <= row < len(self) for row in row_ids]
        chosen = [
            self._chosen[row] if ok else PADDING_ROW
            for row, ok in zip(row_ids, inside, strict=True)
        ]
        return self._rows.batch(chosen, epochs)

    def row_tokens(self, row: int) -> np.ndarray:
        """See `Rows.row_tokens`."""
        return self._rows.row_tokens(int(self._chosen[row]))


def make_batch(rows, seq_len: int, eos_id: int) -> dict[str, np.ndarray]:
    """Stacks rows of up to T + 1 tokens each; None, and what a row lacks, is padding."""
    num_rows = len(rows)
    tokens = np.zeros((num_rows, seq_len), np.int32)
    targets = np.zeros((num_rows, seq_len), np.int32)
    valid = np.zeros((num_rows, seq_len), bool)
    for i, row in enumerate(rows):
        if row is not None:
            size = len(row) - 1
            tokens[i, :size], targets[i, :size], valid[i, :size] = row[:-1], row[1:], True
    begins = (tokens == eos_id) & valid
    begins[:, 0] = True
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    columns = np.arange(seq_len, dtype=np.int32)
    starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": valid.astype(np.float32),
        "positions": np.where(valid, columns - starts, 0).astype(np.int32),
        "segment_ids": np.where(valid, segments, 0).astype(np.int32),
    }


def _load_rows(path: str, seq_len: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.path: {path!r} is no readable .npy file: {error}") from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not len(array):
        raise ValueError(
            f"data.path: {path!r} holds {array.dtype}{list(array.shape)}; "
            "token rows are integers of shape [rows, seq_len + 1]"
        )
    if array.shape[1] != seq_len + 1:
        raise ValueError(
            f"data.seq_len: {seq_len} does not fit the rows of {array.shape[1]} tokens in "
            f"{path!r}; it must be {array.shape[1] - 1}"
        )
    return array


def _cut(num_rows: int, fraction: float) -> int:
    """A border inside the rows that leaves a row on either side."""
    if fraction in (0.0, 1.0):
        return int(num_rows * fraction)
    return min(max(round(num_rows * fraction), 1), num_rows - 1)
