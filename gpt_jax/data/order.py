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

from collections.abc import Sequence

import numpy as np

from gpt_jax.data.hashing import mix64

_ROUNDS = 6
MAX_ROWS = 2**40


# Places in the pattern of a mixture: each component has a whole number of them.
MIXTURE_PERIOD = 1000


def mixture_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Each component's places in a period of MIXTURE_PERIOD; one component has the only place.

    Args:
      weights: above 0; they need not sum to 1.

    Returns:
      Whole numbers of at least 1, in proportion to the weights by largest remainders.
    """
    assert weights and min(weights) > 0, weights
    if len(weights) == 1:
        return (1,)
    exact = np.asarray(weights, np.float64) / sum(weights) * MIXTURE_PERIOD
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while (missing := MIXTURE_PERIOD - counts.sum()) != 0:
        # What a component has less than its share, or where there are too many, the opposite.
        lacking = np.where((missing > 0) | (counts > 1), exact - counts, np.inf)
        counts[np.argmax(lacking) if missing > 0 else np.argmin(lacking)] += np.sign(missing)
    return tuple(counts.tolist())


def mixed_rows(
    seed: int, sizes: Sequence[int], counts: Sequence[int], batch_size: int, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of one global batch of a mixture; as global_rows a pure function of its arguments.

    The stream is cut into periods of sum(counts) places, which a keyed permutation gives to the
    components anew in each period. So after any number of whole periods the proportions are exact,
    and a component's n-th place is known without counting. Each component repeats on its own: its
    places are filled with its rows epoch after epoch, in an order of its own.

    Args:
      seed: any integer.
      sizes: rows in each component.
      counts: places of each component in a period (mixture_counts).
      batch_size: rows in the global batch (B).
      index: which batch, from 0.

    Returns:
      int64[B] each: component, the component's epoch, row in the component.
    """
    places, ends = sum(counts), np.cumsum(counts)
    period, offset = divmod(index * batch_size, places)
    place = offset + np.arange(batch_size, dtype=np.int64)
    period = (period + place // places).astype(np.int64)
    keys = mix64(mix64(np.full(batch_size, (seed + 1) % 2**64, np.uint64)) ^ period.astype("u8"))
    slot = _permute((place % places).astype(np.uint64), places, keys).astype(np.int64)
    component = np.searchsorted(ends, slot, side="right")
    sizes, counts = np.asarray(sizes, np.int64), np.asarray(counts, np.int64)
    number = period * counts[component] + slot - (ends - counts)[component]
    epoch, within = number // sizes[component], number % sizes[component]
    row = np.empty(batch_size, np.int64)
    for c in np.unique(component):
        mine = component == c
        # The first component's orders are those that it has alone.
        keys = mix64(np.full(mine.sum(), (seed + 2**32 * int(c)) % 2**64, np.uint64))
        keys = mix64(keys ^ epoch[mine].astype(np.uint64))
        row[mine] = _permute(within[mine].astype(np.uint64), int(sizes[c]), keys).astype(np.int64)
    return component, epoch, row


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
    return mixed_rows(seed, (num_rows,), (1,), batch_size, index)[2]


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
