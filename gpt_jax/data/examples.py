"""Records to batches: encoded examples, packed and padded to rows.

A record is one encoded example, or one corrupted row: a dict of arrays named as in a batch, without
padding. B rows, T and S the lengths of rows and of an encoder's input, n and m those of a record:

  tokens, targets, loss_mask [n]; positions, segment_ids, key_ranks, query_ranks, token_types [n],
  encoder_tokens, encoder_positions, encoder_segment_ids [m] where they are not what follows from
  one document; or, for a target of the whole row, targets and loss_mask of a shape without n.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from gpt_jax.data.hashing import digest, mix64

Record = dict[str, np.ndarray]
_FLOATS = ("loss_mask",)
# Rows that are open for packing at once: what fits in none of them begins a new one.
_OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of the rows.

    Attributes:
      seq_len: T.
      source_len: S; 0: no encoder input.
      row_targets: targets are [B, ...], one a row, and not one a token.
    """

    seq_len: int
    source_len: int = 0
    row_targets: bool = False

    def collate(self, rows: Sequence[Sequence[Record]]) -> dict[str, np.ndarray]:
        """A batch; a row holds the records of its list behind one another, [] is padding."""
        first = next(record for row in rows for record in row)
        names = ["tokens", "positions", "segment_ids", "targets", "loss_mask"]
        names += [name for name in first if name not in names]
        if self.source_len:
            names += ["encoder_positions", "encoder_segment_ids"]
        batch = {}
        for name in dict.fromkeys(names):
            per_row = self.row_targets and name in ("targets", "loss_mask")
            shape = np.shape(first[name]) if per_row else (self._length(name),)
            dtype = first[name].dtype if per_row else _dtype(name)
            batch[name] = np.zeros((len(rows), *shape), dtype)
        for i, row in enumerate(rows):
            self._fill({name: array[i] for name, array in batch.items()}, i, batch, row)
        return batch

    def _fill(self, views: Record, i: int, batch: Record, row: Sequence[Record]) -> None:
        column, source_column, segments = 0, 0, 0
        for record in row:
            n, m = len(record["tokens"]), len(record.get("encoder_tokens", ()))
            for name, view in views.items():
                if self.row_targets and name in ("targets", "loss_mask"):
                    batch[name][i] = record[name]
                    continue
                source = name.startswith("encoder_")
                start, size = (source_column, m) if source else (column, n)
                values = record.get(name)
                if values is None:
                    values = _default(name, size)
                if name.endswith("segment_ids"):
                    values = np.where(values > 0, values + segments, 0)
                view[start : start + size] = values
            column, source_column = column + n, source_column + m
            segments += int(np.max(record.get("segment_ids", 1)))

    def _length(self, name: str) -> int:
        return self.source_len if name.startswith("encoder_") else self.seq_len

    def fits(self, record: Record) -> bool:
        """Whether the record fits in an empty row."""
        return len(record["tokens"]) <= self.seq_len and (
            len(record.get("encoder_tokens", ())) <= self.source_len
        )


def _dtype(name: str):
    return np.float32 if name in _FLOATS else np.int32


def _default(name: str, size: int) -> np.ndarray:
    """What one document has, where the record does not say."""
    if name.endswith("segment_ids"):
        return np.ones(size, np.int32)
    assert name.endswith("positions"), name
    return np.arange(size, dtype=np.int32)


class ExampleRows:
    """Rows made of records: one each, or as many as fit.

    Attributes as `packing.Rows`; besides `records`, what the rows are made of, in order.
    """

    def __init__(self, records: Sequence[Record], layout: Layout, *, pack: bool = False):
        """
        Args:
          records: All fit the layout.
          layout: The shape of the rows.
          pack: Several records a row, as segments that do not see each other.
        """
        assert records and all(map(layout.fits, records)), "records that do not fit"
        self.records = records
        self._layout = layout
        self._rows = pack_records(records, layout) if pack else [[i] for i in range(len(records))]
        self.seq_len = layout.seq_len
        self.num_tokens = max(1, round(sum(float(r["loss_mask"].sum()) for r in records)))
        self.num_bytes = 0
        self.num_documents = len(records)
        self.skipped = ()
        contents = [[name, _checksum(r[name])] for r in records for name in sorted(r)]
        self.fingerprint = digest("examples", dataclasses.asdict(layout), pack, contents)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, row_ids, epochs=None) -> dict[str, np.ndarray]:
        """Rows by number; a number outside [0, len) gives a row of padding.  See `Rows.batch`."""
        size = len(self)
        rows = [self._rows[row] if 0 <= row < size else [] for row in map(int, row_ids)]
        if not any(rows):  # all padding: one row lends its fields
            return {k: np.zeros_like(v) for k, v in self.batch([0] * len(rows)).items()}
        return self._layout.collate([[self.records[i] for i in row] for row in rows])

    def row_tokens(self, row: int) -> np.ndarray:
        """int[n], what is read in a row, an encoder's input first."""
        records = [self.records[i] for i in self._rows[row]]
        names = ("encoder_tokens", "tokens")
        return np.concatenate([r[name] for r in records for name in names if name in r])


def pack_records(records: Sequence[Record], layout: Layout) -> list[list[int]]:
    """Record numbers by row: each goes to the first open row that has place for it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int, int]] = []  # row, places left, places left for the source
    for i, record in enumerate(records):
        n, m = len(record["tokens"]), len(record.get("encoder_tokens", ()))
        for k, (row, left, source_left) in enumerate(open_rows):
            if n <= left and m <= source_left:
                rows[row].append(i)
                open_rows[k] = (row, left - n, source_left - m)
                break
        else:
            rows.append([i])
            open_rows.append((len(rows) - 1, layout.seq_len - n, layout.source_len - m))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[1]))
    return rows


class CorruptedRows:
    """Rows of a corpus, changed at random: by seed, epoch and row, and by nothing else.

    Args:
      rows: `packing.Rows` or `TokenRows`.
      corrupt: (tokens int[n] of a row, generator) -> record.
      layout: The shape of what it gives.
      seed: Another seed is another corruption.
    """

    def __init__(self, rows, corrupt: Callable, layout: Layout, seed: int):
        self._rows, self._corrupt, self._layout, self._seed = rows, corrupt, layout, seed
        self.seq_len = layout.seq_len
        for name in ("num_tokens", "num_bytes", "num_documents", "skipped", "fingerprint"):
            setattr(self, name, getattr(rows, name))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, row_ids, epochs=None) -> dict[str, np.ndarray]:
        """See `Rows.batch`."""
        epochs = np.zeros(len(row_ids), np.int64) if epochs is None else epochs
        rows = [
            [self._record(int(row), int(epoch))] if 0 <= row < len(self) else []
            for row, epoch in zip(row_ids, epochs, strict=True)
        ]
        if not any(rows):
            return {k: np.zeros_like(v) for k, v in self.batch([0] * len(rows)).items()}
        return self._layout.collate(rows)

    def row_tokens(self, row: int) -> np.ndarray:
        """The row as it is without corruption; see `Rows.row_tokens`."""
        return self._rows.row_tokens(row)

    def _record(self, row: int, epoch: int) -> Record:
        key = mix64(np.array([self._seed % 2**64, epoch, row], np.uint64))
        generator = np.random.Generator(np.random.PCG64(key.tolist()))
        return self._corrupt(self._rows.row_tokens(row), generator)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
