"""A row of a batch as its model sees it, document by document, for people.

A document is a segment of the row; an example of a task is one too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gpt_jax.data.permutation import NEVER_A_KEY
from gpt_jax.data.prefixes import prefix_ranks
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.reports.token_lines import (
    CLOSE,
    CORRUPTED,
    DIM,
    OPEN,
    TARGET,
    Cell,
    Page,
    pieces,
    visible,
    wrap,
)
from gpt_jax.runs.config import RunConfig

Row = Mapping[str, np.ndarray]
# Objectives that predict what was at the place of a token, not what is behind it.
_HIDING = ("masked_lm", "permutation_lm")
_SIGHT = {
    "causal": "each token sees itself and those before it",
    "whole": "all tokens see each other",
    "prefix": "the first {} see each other, from there on each sees itself and those before it",
    "order": "each token sees those with a rank up to its own",
    "queries": "each token and query sees those with a rank up to its own, none sees a query",
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is needed to read a row.

    Attributes:
      config: The run's.
      tokenizer: The data's.
      page: Where lines are shown.
      corrupted: Ids of the tokens that stand for others.
      labels: Names of the classes of the row's task; (): there are none.
    """

    config: RunConfig
    tokenizer: Tokenizer
    page: Page
    corrupted: frozenset[int]
    labels: tuple[str, ...] = ()

    @property
    def hides(self) -> bool:
        """Whether a target is the token that was at its place."""
        return self.config.objective.name in _HIDING

    @property
    def in_place(self) -> bool:
        """Whether a target belongs to its token, not to the next one."""
        return self.hides or self.config.model.head == "tokens"

    @property
    def by_row(self) -> bool:
        """Whether targets are the row's, not the tokens'."""
        return self.config.model.head in ("sequence", "span")

    def target_text(self, target) -> str:
        """The class, number or token that a target is."""
        if self.config.model.head in ("sequence", "tokens"):
            integer = np.issubdtype(np.asarray(target).dtype, np.integer)
            return self.labels[target] if integer and self.labels else f"{target:g}"
        return visible(self.tokenizer.token_text(target))


def row_lines(reader: Reader, row: Row, title: str) -> Iterator[str]:
    """A row: what it holds, then document by document."""
    segment_ids = row["segment_ids"]
    sizes = [_size(segment_ids, reader.page)]
    if "encoder_segment_ids" in row:
        sizes = [f"source {_size(row['encoder_segment_ids'], reader.page)}", f"target {sizes[0]}"]
    yield title
    yield f"  {'; '.join(sizes)}"
    if reader.by_row:
        yield f"  target: {_row_target(reader, row)}"
    name = "example" if reader.config.tasks.names else "document"
    documents = [np.flatnonzero(segment_ids == s) for s in range(1, segment_ids.max() + 1)]
    seen = [_sight(reader.config.model.family, row, columns) for columns in documents]
    if len(set(seen)) == 1:
        yield f"  {seen[0]}" + (f"; none sees another {name}" if len(seen) > 1 else "")
    for number, (columns, sight) in enumerate(zip(documents, seen, strict=True), 1):
        more = f"; {sight}" if len(set(seen)) > 1 else ""
        called = f"{name} {number}"
        if reader.config.objective.name == "dpo":
            called = ("chosen", "rejected")[(number - 1) % 2]
        yield f"  {called}: {_counts(reader, row, columns)}{more}"
        yield from _document(reader, row, columns, number)


def _size(segment_ids: np.ndarray, page: Page) -> str:
    padding = int((segment_ids == 0).sum())
    size = len(segment_ids)
    if not padding:
        return f"{size} tokens, no padding"
    return f"{size - padding} tokens" + page.paint(
        f" and {padding} of padding ({padding / size:.0%})", DIM
    )


def _row_target(reader: Reader, row: Row) -> str:
    if not np.any(row["loss_mask"]):
        return "none"
    if reader.config.model.head == "sequence":
        return reader.target_text(row["targets"])
    first, last = row["targets"]
    if not last:
        return "no answer (first token)"
    return f"tokens {first}-{last}"


def _counts(reader: Reader, row: Row, columns: np.ndarray) -> str:
    """Tokens, positions, types and targets of a document."""
    words = [f"{len(columns)} tokens"]
    own = _content(row, columns)
    positions = row["positions"][own]
    words.append(f"positions {positions[0]}-{positions[-1]}")
    if "token_types" in row:
        types = row["token_types"][columns]
        words += [f"{(types == t).sum()} of type {t}" for t in np.unique(types) if types.any()]
    if not reader.by_row:
        words.append(f"{int((row['loss_mask'][columns] > 0).sum())} targets")
    return ", ".join(words)


def _content(row: Row, columns: np.ndarray) -> np.ndarray:
    """The columns without the queries of a permutation."""
    keys = row["key_ranks"][columns] if "key_ranks" in row else np.zeros(len(columns))
    return columns[keys < NEVER_A_KEY]


def _sight(family: str, row: Row, columns: np.ndarray) -> str:
    """Who sees whom in a document, in words."""
    causal = _SIGHT["causal"]
    if family == "encoder_decoder":
        causal += ", and the whole source, whose tokens see each other"
    if "key_ranks" not in row:
        return _SIGHT["whole"] if family == "encoder" else causal
    keys, queries = row["key_ranks"][columns], row["query_ranks"][columns]
    if not keys.any() and not queries.any():
        return _SIGHT["whole"]
    # Rank 1 follows the tokens that see each other.
    together = int((keys == 0).sum())
    expected = prefix_ranks(np.arange(len(columns)), together + 1)
    if np.array_equal(keys, queries) and np.array_equal(keys, expected):
        return _SIGHT["prefix"].format(together) if together > 1 else causal
    return _SIGHT["queries" if keys.max() == NEVER_A_KEY else "order"]


def _document(reader: Reader, row: Row, columns: np.ndarray, number: int) -> Iterator[str]:
    indent = "    "
    if "encoder_tokens" in row:
        source = row["encoder_tokens"][row["encoder_segment_ids"] == number]
        yield from wrap(_source_cells(reader, source), reader.page, ["source"], indent)
        yield from wrap(_cells(reader, row, columns), reader.page, ["target"], indent)
        return
    content = _content(row, columns)
    sight = _sight(reader.config.model.family, row, columns)
    ordered = sight in (_SIGHT["order"], _SIGHT["queries"])
    ranks = row["query_ranks"] if ordered else None
    beneath = {"rank": [str(r) for r in ranks]} if ordered else {}
    label = "content" if len(content) < len(columns) else ""
    yield from _lines(reader, row, content, label, beneath)
    queries = np.setdiff1d(columns, content)
    if len(queries):
        at = [str(p) for p in row["positions"]]
        yield from _lines(reader, row, queries, "queries", {"position": at, **beneath})


def _lines(reader, row, columns, label: str, beneath: dict[str, list[str]]) -> list[str]:
    cells = _cells(reader, row, columns, tuple(beneath.values()))
    return wrap(cells, reader.page, [label, *beneath], "    " if label else "  ")


def _source_cells(reader: Reader, ids: np.ndarray) -> list[Cell]:
    kinds = [int(i) in reader.corrupted for i in ids]
    texts = pieces(reader.tokenizer, ids, kinds)
    return [Cell(((text, CORRUPTED if kinds[start] else ""),)) for text, start, _ in texts]


def _cells(
    reader: Reader, row: Row, columns: np.ndarray, beneath: Sequence[Sequence[str]] = ()
) -> list[Cell]:
    """The tokens of a document; `beneath` has a text for each column of the row, a line each."""
    ids, n = row["tokens"][columns], len(columns)
    targeted, behind = np.zeros(n, bool), {}
    if not reader.by_row:
        targets, counted = row["targets"][columns], row["loss_mask"][columns] > 0
        following = np.append(ids[1:], -1)
        here = counted & (reader.in_place | (targets != following))
        if not reader.in_place and counted[-1]:  # what follows the last token is no input
            ids, here[-1] = np.append(ids, targets[-1]), False
            targeted = np.append(targeted, False)
        behind = {int(i): reader.target_text(targets[i]) for i in np.flatnonzero(here)}
        shifted = np.flatnonzero(counted & ~here) + 1
        targeted[shifted] = True
    elif reader.config.model.head == "span" and row["targets"][1]:
        targeted[row["targets"][0] : row["targets"][1] + 1] = True
    return _marked(reader, ids, targeted, behind, columns, beneath)


def _marked(reader, ids, targeted, behind, columns, beneath) -> list[Cell]:
    """Cells of ids: `targeted` bool[n] stand between marks, `behind` have a target of their own."""
    # Tokens with a target of their own are never put together with others.
    kinds = [(bool(t), i if i in behind else -1) for i, t in enumerate(targeted)]
    cells = []
    for text, start, stop in pieces(reader.tokenizer, ids, kinds):
        style = TARGET if targeted[start] else ""
        changed = reader.hides and behind.get(start, text) != text
        if not style and (changed or int(ids[start]) in reader.corrupted):
            style = CORRUPTED
        spans = [(text, style)]
        if targeted[start] and (start == 0 or not targeted[start - 1]):
            spans.insert(0, (OPEN, DIM))
        if targeted[start] and (stop == len(ids) or not targeted[stop]):
            spans.append((CLOSE, DIM))
        if start in behind:
            spans += [(f"{OPEN}→", DIM), (behind[start], TARGET), (CLOSE, DIM)]
        under = tuple(line[columns[start]] if start < len(columns) else "" for line in beneath)
        cells.append(Cell(tuple(spans), under))
    return cells
