"""One view of a split of any corpus: texts by number, decoded by policy, held-out parts cut off.

A collection (text files, JSONL rows, a TFDS split) gives raw documents; `Documents` chooses which
of them, and which part of each, belong to the train or to the validation split.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from gpt_jax.data.config import DataConfig
from gpt_jax.data.hashing import digest

# With fewer documents than this, held-out whole documents would be too few to measure with.
MIN_DOCUMENTS_TO_HOLD_OUT = 20
_LINE_BYTES = 256
TRAIN, VALIDATION = "train", "validation"


class Collection(Protocol):
    """Raw documents of one corpus."""

    label: str  # names the corpus in messages and receipts
    fingerprint: str  # changes whenever the content does
    random_access: bool  # reading out of order costs no more than in order

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Names document i for people: a path, a row."""

    def raw(self, i: int):
        """UTF-8 bytes of document i, as a buffer (bytes, mmap)."""

    def unit_hashes(self) -> np.ndarray:
        """float64[len] in [0, 1): a hash of each document's place, not of its content."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The texts of one split.

    Attributes:
      collection: where the documents come from.
      indices: which of them belong to the split, int64[n], rising; None for all.
      part: "whole", or "head" or "tail" of every document, for a corpus of few documents.
      fraction: size of the tail.
      on_invalid_utf8: see DataConfig.
    """

    collection: Collection
    indices: np.ndarray | None
    part: str
    fraction: float
    on_invalid_utf8: str

    def __len__(self) -> int:
        return len(self.collection) if self.indices is None else len(self.indices)

    def __getitem__(self, i: int) -> str | None:
        """Text i, or None where it is no UTF-8 and the policy is to skip it.

        Raises:
          ValueError: it is no UTF-8 and the policy is "error"; names the place and the option.
          IndexError: i is not in [0, len).
        """
        number = self._number(i)
        raw = self.collection.raw(number)
        lo, hi = _span(raw, self.part, self.fraction)
        data = raw if (lo, hi) == (0, len(raw)) else memoryview(raw)[lo:hi]
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            if self.on_invalid_utf8 == "skip":
                return None
            if self.on_invalid_utf8 == "replace":
                return str(data, "utf-8", "replace")
            raise ValueError(
                f"data.path: {self.collection.name(number)}: byte {lo + error.start} is not "
                "UTF-8; repair it, or set data.on_invalid_utf8 to 'skip' or 'replace'"
            ) from None

    def __iter__(self) -> Iterator[str | None]:
        return (self[i] for i in range(len(self)))

    def document_name(self, i: int) -> str:
        """Names document i for people."""
        return self.collection.name(self._number(i))

    @property
    def label(self) -> str:
        """Names the corpus."""
        return self.collection.label

    @property
    def random_access(self) -> bool:
        """Reading out of order costs no more than in order."""
        return self.collection.random_access

    @property
    def fingerprint(self) -> str:
        """Changes whenever the texts may have."""
        chosen = "all" if self.indices is None else digest(self.indices.tolist())
        return digest(
            self.collection.fingerprint, chosen, self.part, self.fraction, self.on_invalid_utf8
        )

    def _number(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return int(i if self.indices is None else self.indices[i])


def whole(collection: Collection, config: DataConfig) -> Documents:
    """All documents of a collection."""
    return Documents(collection, None, "whole", 0.0, config.on_invalid_utf8)


def held_out(collection: Collection, config: DataConfig, split: str) -> Documents:
    """One side of a collection that names no validation data.

    From 20 documents on whole documents are held out, chosen by a hash of their place, so that an
    added document moves no other.  Below that the tail of every document is.
    """
    fraction, policy = config.validation_fraction, config.on_invalid_utf8
    if len(collection) < MIN_DOCUMENTS_TO_HOLD_OUT:
        part = "head" if split == TRAIN else "tail"
        return Documents(collection, None, part, fraction, policy)
    hashes = collection.unit_hashes()
    is_validation = hashes < fraction
    is_validation[np.argmin(hashes)] = True  # a small corpus may have none below the fraction
    is_validation[np.argmax(hashes)] = False
    indices = np.flatnonzero(is_validation == (split == VALIDATION))
    return Documents(collection, indices, "whole", 0.0, policy)


def _span(raw: Sequence[int], part: str, fraction: float) -> tuple[int, int]:
    """The bytes [lo, hi) of a document that are its head or tail."""
    size = len(raw)
    if part == "whole" or size == 0:
        return 0, size
    tail = min(size, max(1, round(size * fraction)))
    cut = size - tail
    # A line end close before the cut: the tail grows to twice its size, or by a few short lines.
    window = min(cut // 2, max(tail, _LINE_BYTES))
    line_end = raw.rfind(b"\n", cut - window, cut)
    if line_end >= 0:
        cut = line_end + 1
    else:
        while cut > 0 and raw[cut] & 0xC0 == 0x80:  # not inside a character
            cut -= 1
    return (0, cut) if part == "head" else (cut, size)
