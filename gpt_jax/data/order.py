"""The order of the data: which rows make global batch `index`, computed in O(batch).

Position g = index * batch_size + b of the endless stream of rows lies in epoch g // num_rows, and
every epoch visits every row once, in an order of its own.  A shuffled list would cost memory and
start-up time in proportion to the corpus, and a shuffle buffer would make the order depend on
where reading began.  So the order is a keyed bijection instead: a Feistel network over the
smallest even number of bits that holds num_rows.  It may map a row number beyond the end; then it
is applied again until it lands inside ("cycle walking"), which keeps it a bijection of
[0, num_rows) because each walk follows one cycle of the larger permutation.  The network is at
most four times as large as the range, so four tries are expected at worst.
"""

import numpy as np

from gpt_jax.data.hashing import mix64

_ROUNDS = 6
MAX_ROWS = 2**40


def global_rows(seed: int, num_rows: int, batch_size: int, index: int) -> np.ndarray:
    """The rows of one global batch.

    A pure function of its arguments: the same on every host, with any number of hosts, and from
    any starting index.

    Args:
      seed: any integer; another seed is another order.
      num_rows: rows in the corpus, 1 to 2**40.
      batch_size: rows in the global batch (B); a batch may straddle epochs.
      index: which batch, from 0.

    Returns:
      int64[B], row numbers in [0, num_rows).
    """
    assert 1 <= num_rows <= MAX_ROWS, num_rows
    assert batch_size >= 1 and index >= 0, (batch_size, index)
    # Python integers first: index * batch_size must not overflow.
    epoch, offset = divmod(index * batch_size, num_rows)
    position = offset + np.arange(batch_size, dtype=np.int64)
    epochs = (epoch + position // num_rows).astype(np.uint64)
    keys = mix64(mix64(np.full(batch_size, seed % 2**64, np.uint64)) ^ epochs)
    return _permute((position % num_rows).astype(np.uint64), num_rows, keys).astype(np.int64)


def _permute(x: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, size) for each key, applied to uint64[n] elementwise."""
    half_bits = ((size - 1).bit_length() + 1) // 2
    if half_bits == 0:
        return x
    x = _feistel(x, half_bits, keys)
    while (outside := np.flatnonzero(x >= size)).size:
        x[outside] = _feistel(x[outside], half_bits, keys[outside])
    return x


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of 2 * half_bits bits: each round XORs one half with a hash of the other."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for round_number in range(_ROUNDS):
        round_keys = mix64(keys + np.uint64(round_number))
        left, right = right, left ^ (mix64(round_keys ^ right) & mask)
    return (left << shift) | right
