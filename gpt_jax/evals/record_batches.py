"""Records of unequal length in batches of few shapes.

B rows, T length, S length of an encoder's input.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from gpt_jax.data.examples import Layout, Record

_MIN_LENGTH = 16


def record_batches(
    records: Sequence[Record], batch_size: int, *, row_targets: bool = False, most: int = 0
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(numbers of records, their batch): long ones first, each padded to about its own length.

    Args:
      records: As in data.examples; one a row.
      batch_size: B; the last batch is filled up with rows of padding.
      row_targets: Targets are [B, ...].
      most: What no length is rounded up beyond, such as the size of a table of positions; 0: none.
    """
    order = sorted(range(len(records)), key=lambda i: -_size(records[i], "tokens"))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        chosen = [records[i] for i in numbers]
        lengths = [
            _rounded(max(_size(record, name) for record in chosen), most)
            for name in ("tokens", "encoder_tokens")
        ]
        rows = [[record] for record in chosen] + [[]] * (batch_size - len(chosen))
        yield numbers, Layout(*lengths, row_targets).collate(rows)


def _size(record: Record, name: str) -> int:
    return len(record.get(name, ()))


def _rounded(size: int, most: int) -> int:
    """Up to a power of two, or half way to it: few programs to compile, little padding."""
    if not size:
        return 0
    power = max(_MIN_LENGTH, 1 << (size - 1).bit_length())
    rounded = 3 * power // 4 if size <= 3 * power // 4 and power > _MIN_LENGTH else power
    return max(size, min(rounded, most)) if most else rounded
