"""Keys and values of prompts that were read, for prompts that begin like them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.decode import caches
from gpt_jax.decode.prompts import MIN_BUCKET, bucket
from gpt_jax.models.transformer import Cache

# A shorter common beginning is not worth a copy.
MIN_COMMON = 32


class _Entry(NamedTuple):
    ids: np.ndarray
    cache: Cache  # one row, its places a power of two

    @property
    def size(self) -> int:
        return bucket(len(self.ids), MIN_BUCKET)


class Prefixes:
    """The prompts used last, up to a number of places.

    Attributes:
      num_places: How many places they take.
    """

    def __init__(self, max_places: int):
        self._max_places = max_places
        self._entries: list[_Entry] = []  # the one used last is last

    @property
    def num_places(self) -> int:
        return sum(entry.size for entry in self._entries)

    def longest(self, text: Sequence[int]) -> tuple[int, Cache | None]:
        """The longest known beginning of a text, without its last token, and its cache of one row.

        (0, None) where nothing of MIN_COMMON tokens is known.
        """
        if not self._entries:
            return 0, None
        ids = np.asarray(text[:-1], np.int32)
        common = [_num_common(entry.ids, ids) for entry in self._entries]
        # Of equal ones the shortest entry is the cheapest to copy.
        best = max(range(len(common)), key=lambda i: (common[i], -len(self._entries[i].ids)))
        if common[best] < MIN_COMMON:
            return 0, None
        entry = self._entries.pop(best)
        self._entries.append(entry)
        return common[best], entry.cache

    def add(self, text: Sequence[int], cache: Cache, row: int) -> None:
        """Keeps all but the last token of a text, which are in row `row` of a cache."""
        ids = np.asarray(text[:-1], np.int32)
        size = bucket(len(ids), MIN_BUCKET)
        if len(ids) < MIN_COMMON or size > self._max_places:
            return
        if any(_num_common(entry.ids, ids) == len(ids) for entry in self._entries):
            return
        # What the new one begins with needs no place of its own.
        self._entries = [
            entry for entry in self._entries if _num_common(entry.ids, ids) < len(entry.ids)
        ]
        while self.num_places + size > self._max_places:
            self._entries.pop(0)
        kept = caches.resized(cache, np.full(1, row, np.int32), length=size)
        self._entries.append(_Entry(ids, kept))


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common beginning."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if len(differs) else size
