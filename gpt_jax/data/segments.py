"""The documents in a row of tokens: a segment begins at each end-of-text token, and at the start.

n tokens. Random corruption takes a numpy Generator that its caller keys by (seed, epoch, row).
"""

import numpy as np


def segment_row(tokens: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, which restart in each document, and segment ids, which count them from 1.

    Args:
      tokens: int[n].
      eos_id: The token that begins a document; -1: the row is one document.

    Returns:
      positions int32[n], segment_ids int32[n].
    """
    begins = tokens == eos_id
    begins[:1] = True
    columns = np.arange(len(tokens), dtype=np.int32)
    starts = np.maximum.accumulate(np.where(begins, columns, 0))
    return (columns - starts).astype(np.int32), np.cumsum(begins, dtype=np.int32)


def split_row(tokens: np.ndarray, eos_id: int) -> list[np.ndarray]:
    """The documents of a row, int[n_i] each; all but the first begin with `eos_id`."""
    return np.split(tokens, np.flatnonzero(tokens[1:] == eos_id) + 1)


def make_record(
    tokens: np.ndarray, targets: np.ndarray, loss_mask: np.ndarray, eos_id: int, **more: np.ndarray
) -> dict[str, np.ndarray]:
    """A record with the types of a batch, its documents found by `eos_id`.

    Args:
      tokens, targets: int[n].
      loss_mask: [n], what counts.
      eos_id: See `segment_row`.
      more: Integers [n] or of another length, which win over the fields that are found here.
    """
    positions, segment_ids = segment_row(tokens, eos_id)
    record = {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        **more,
    }
    record = {name: np.asarray(array, np.int32) for name, array in record.items()}
    return {**record, "loss_mask": np.asarray(loss_mask, np.float32)}
