"""Several collections one after the other, as one."""

import numpy as np

from gpt_jax.data.documents import Collection
from gpt_jax.data.hashing import digest


class Chain:
    """The documents of several collections, in their order.

    Args:
      label: names the whole in messages and receipts.
      collections: at least one.
    """

    def __init__(self, label: str, collections: list[Collection]):
        assert collections
        self.label = label
        self._collections = collections
        self._ends = np.cumsum([len(collection) for collection in collections])
        self.random_access = all(collection.random_access for collection in collections)
        self.fingerprint = digest("chain", [each.fingerprint for each in collections])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, i: int) -> str:
        """Names document i for people."""
        collection, number = self._locate(i)
        return collection.name(number)

    def raw(self, i: int):
        """UTF-8 bytes of document i."""
        collection, number = self._locate(i)
        return collection.raw(number)

    def unit_hashes(self) -> np.ndarray:
        """float64[len], as each collection has them."""
        return np.concatenate([collection.unit_hashes() for collection in self._collections])

    def _locate(self, i: int) -> tuple[Collection, int]:
        which = int(np.searchsorted(self._ends, i, side="right"))
        return self._collections[which], i - (int(self._ends[which - 1]) if which else 0)
