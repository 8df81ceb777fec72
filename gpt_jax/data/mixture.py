"""What training reads: one or several sets of rows, in one endless order."""

from collections.abc import Sequence

import numpy as np

from gpt_jax.data import order
from gpt_jax.data.hashing import digest


class Mixture:
    """Sets of rows with weights; each repeats on its own.

    Attributes:
      parts: rows by name; see `packing.Rows` for what rows are.
      shares: the exact share that each has of the places in the order.
      seq_len, num_tokens, num_bytes, num_documents, skipped: of all parts together.
      fingerprint: changes whenever a batch may.
    """

    def __init__(self, parts: dict, weights: Sequence[float] = ()):
        """
        Args:
          parts: rows by name, all of one shape.
          weights: above 0, one a part; (): all alike.
        """
        self.parts = parts
        rows = list(parts.values())
        self._rows = rows
        self._counts = order.mixture_counts(tuple(weights) or (1.0,) * len(rows))
        total = sum(self._counts)
        self.shares = {n: c / total for n, c in zip(parts, self._counts, strict=True)}
        self.seq_len = rows[0].seq_len
        self.num_tokens = sum(part.num_tokens for part in rows)
        self.num_bytes = sum(part.num_bytes for part in rows)
        self.num_documents = sum(part.num_documents for part in rows)
        self.skipped = tuple(name for part in rows for name in part.skipped)
        self.fingerprint = rows[0].fingerprint
        if len(rows) > 1:
            self.fingerprint = digest("mixture", self._counts, [p.fingerprint for p in rows])

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def picks(self, seed: int, batch_size: int, index: int):
        """Part, epoch of the part and row in it of a global batch: int64[B] each."""
        sizes = [len(part) for part in self._rows]
        return order.mixed_rows(seed, sizes, self._counts, batch_size, index)

    def describe(self, seed: int, batch_size: int, index: int) -> list:
        """The rows of a global batch for people: numbers, or with several parts "name:row"."""
        part, _, row = self.picks(seed, batch_size, index)
        if len(self.parts) == 1:
            return row.tolist()
        names = list(self.parts)
        return [f"{names[p]}:{r}" for p, r in zip(part, row, strict=True)]

    def batch(self, seed: int, batch_size: int, index: int, local_rows=None) -> dict:
        """This host's rows of a global batch.

        Args:
          seed, batch_size, index: see `order.mixed_rows`.
          local_rows: positions in the global batch that this host needs, int[b]; None: all.
        """
        part, epoch, row = self.picks(seed, batch_size, index)
        if local_rows is not None:
            part, epoch, row = part[local_rows], epoch[local_rows], row[local_rows]
        if len(self._rows) == 1:
            return self._rows[0].batch(row, epoch)
        result: dict[str, np.ndarray] = {}
        for number in np.unique(part):
            mine = np.flatnonzero(part == number)
            fields = self._rows[number].batch(row[mine], epoch[mine])
            # What one part lacks would be zeros, which mean something.
            assert not result or set(fields) == set(result), (set(fields), set(result))
            for name, array in fields.items():
                if name not in result:
                    result[name] = np.zeros((len(part), *array.shape[1:]), array.dtype)
                result[name][mine] = array
        return result


def mixture_weights(sizes: Sequence[int], temperature: float, cap: int) -> tuple[float, ...]:
    """Weights by size: min(size, cap) ** (1 / temperature) (arXiv:1910.10683, section 3.5.2).

    Args:
      sizes: examples in each part.
      temperature: 1: in proportion to the sizes; towards infinity: all alike.
      cap: no part counts for more examples than this; 0: no cap.
    """
    capped = (min(size, cap) if cap else size for size in sizes)
    return tuple(float(size) ** (1.0 / temperature) for size in capped)
