"""What a parser of a corpus gives, and how its rows fall into train, validation and test."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from gpt_jax.data.hashing import unit_hash

SPLITS = ("train", "validation", "test")
# By kind of corpus: the fields of a row, of which the first is its identity.
KINDS = {
    "text": ("text",),
    "classification": ("text", "label"),
    "tagging": ("words", "tags"),
    "translation": ("source", "target"),
    "preference": ("prompt", "chosen", "rejected"),
    "chat": ("messages",),
    "code": ("prompt",),
}


class Row(NamedTuple):
    """One row of a corpus.

    Attributes:
      fields: what is written.
      group: rows of one group fall into one split; "" for the row's own identity.
      split: where the package itself says where the row belongs; "" for a hash of the group.
    """

    fields: dict
    group: str = ""
    split: str = ""


def assign(
    rows: Iterable[Row], kind: str, shares: tuple[float, float]
) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Gives each row its split, so that no two splits share a text.

    The split is a hash of the group (corpora that share a package share their groups, so a file
    held out in one of them is in the other too).  A text found again is dropped: test keeps it
    before validation, validation before train; splits that the package makes itself may repeat a
    text within. Texts that come with two labels are dropped everywhere.

    Args:
      rows: in the package's order, which is kept.
      kind: one of KINDS.
      shares: of validation and of test among rows that have no split of their own.

    Returns:
      Rows by split, and how many were dropped for what.
    """
    placed, best, labels = [], {}, {}
    for row in rows:
        identity = _identity(row.fields[KINDS[kind][0]])
        split = row.split or _by_hash(row.group or identity, shares)
        rank = SPLITS.index(split)
        best[identity] = max(rank, best.get(identity, 0))
        if kind == "classification":
            labels.setdefault(identity, set()).add(row.fields["label"])
        placed.append((identity, rank, row))
    splits, dropped, seen = {split: [] for split in SPLITS}, Counter(), set()
    for identity, rank, row in placed:
        if len(labels.get(identity, ())) > 1:
            dropped["contradictory"] += 1
        elif rank < best[identity]:
            dropped["in_another_split"] += 1
        elif identity in seen and not row.split:
            dropped["duplicate"] += 1
        else:
            seen.add(identity)
            splits[SPLITS[rank]].append(row.fields)
    return splits, dict(dropped)


def _identity(value) -> str:
    """A digest of a text that does not see case and white space."""
    if isinstance(value, list):  # words, or the messages of a chat, of which the first asks
        value = " ".join(value) if isinstance(value[0], str) else value[0]["content"]
    text = " ".join(value.split()).casefold()
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _by_hash(group: str, shares: tuple[float, float]) -> str:
    at = unit_hash(f"corpus split/{group}")
    validation, test = shares
    return "validation" if at < validation else "test" if at < validation + test else "train"
