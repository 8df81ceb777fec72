"""Rows of a run's data as its model will see them, and what the data are as a whole; for people."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from gpt_jax.data.mixture import Mixture
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.objectives.transforms import special_ids
from gpt_jax.reports.row_lines import Reader, row_lines
from gpt_jax.reports.token_lines import BORDER, CLOSE, OPEN, Page, text_width
from gpt_jax.runs.config import RunConfig
from gpt_jax.tasks.table import find_task

# Rows of a part that shares are measured on, evenly over it.
_MEASURED = 256


def inspect(
    config: RunConfig,
    data: PreparedData,
    cache_dir,
    page: Page,
    *,
    rows: int = 4,
    index: int = 0,
    part: str = "",
) -> Iterator[str]:
    """Lines about the first rows of a training batch, then about the data as a whole.

    Args:
      config: The run's.
      data: What prepare_run makes of it.
      cache_dir: Where the tasks' data are.
      page: Where the lines are shown.
      rows: How many to show; where a batch has fewer, those of the next ones follow.
      index: Of the first batch.
      part: Only rows of this part of a mixture; "": of all.

    Raises:
      ValueError: There is no such part.
    """
    if part and part not in data.train.parts:
        raise ValueError(f"part: {part!r} is not one of {', '.join(data.train.parts)}")
    tokenizer, model = data.tokenizer, config.model
    ids = special_ids(
        config.objective,
        config.data.seq_len,
        tokenizer.token_id,
        tokenizer.eos_id,
        model.start_id,
    )
    corrupted = frozenset({ids.mask, *ids.sentinels, *ids.infilling})
    reader = Reader(config, tokenizer, page, corrupted)
    yield from _legend(reader)
    labels = {name: find_task(name).labels for name in config.tasks.names}
    for place, name, epoch, number, row in _drawn(config, data.train, rows, index, part):
        yield ""
        own = dataclasses.replace(reader, labels=labels.get(name, ()))
        title = f"batch {place[0]}, row {place[1]} (row {number} of {name}, epoch {epoch})"
        yield from row_lines(own, row, title)
    yield ""
    yield from _summary(reader, data, cache_dir)


def _legend(reader: Reader) -> Iterator[str]:
    config = reader.config
    article = "an" if config.model.family.startswith("e") else "a"
    head = f"{article} {config.model.family} with head {config.model.head!r}"
    yield f"{config.objective.name} for {head}, {config.train.batch_size} rows a batch"
    marked = f"between {OPEN} and {CLOSE}: what is to be predicted"
    if reader.in_place:
        marked = f"{OPEN}→target{CLOSE}: what is to be predicted at the token before"
    elif config.model.head == "span":
        marked = f"between {OPEN} and {CLOSE}: the answer"
    elif config.model.head == "sequence":
        marked = "to be predicted: one target a row"
    else:
        marked += "; a document's last such token is no input"
    yield marked
    yield f"{BORDER} a border of tokens, ⏎ a line break"


def _drawn(config: RunConfig, train: Mixture, count: int, index: int, part: str) -> Iterator[tuple]:
    """((batch, row in it), part, epoch, row of the part, the row as the model gets it)."""
    names, size = list(train.parts), config.train.batch_size
    for batch_index in itertools.count(index):
        parts, epochs, numbers = train.picks(config.seed, size, batch_index)
        places = [i for i in range(size) if not part or names[parts[i]] == part][:count]
        if places:
            # The whole batch: what fields a row has depends on the others.
            batch = train.batch(config.seed, size, batch_index)
        for i in places:
            row = {name: array[i] for name, array in batch.items()}
            yield (batch_index, i), names[parts[i]], epochs[i], numbers[i], row
        count -= len(places)
        if not count:
            return


def _summary(reader: Reader, data: PreparedData, cache_dir) -> Iterator[str]:
    """A table of what is trained on, a line a part; then what is held out."""
    config = reader.config
    heads = ("training data", "batches", "rows", "examples", "padding", "targets a row", "left out")
    if not config.tasks.names:
        heads = (*heads[:3], "documents", *heads[4:])
    left_out = {}
    for name in config.tasks.names:
        there = len(find_task(name).examples("train", cache_dir, config.tasks.limit))
        left_out[name] = there - data.train.parts[name].num_documents
    table = [heads]
    for name, rows in data.train.parts.items():
        padding, targets, share = _measure(rows, reader.by_row)
        of_tokens = "" if share is None else f" ({share:.1%} of tokens)"
        table.append((
            name, f"{data.train.shares[name]:.1%}", f"{len(rows):,}", f"{rows.num_documents:,}",
            f"{padding:.1%}", f"{targets:,.1f}{of_tokens}",
            f"{left_out.get(name, len(rows.skipped)):,}",
        ))  # fmt: skip
    widths = [max(map(text_width, column)) for column in zip(*table, strict=True)]
    for line in table:
        rest = "  ".join(f"{text:>{w}}" for text, w in zip(line[1:], widths[1:], strict=True))
        yield f"{line[0]}{' ' * (widths[0] - text_width(line[0]))}  {rest}"
    if max(map(len, data.train.parts.values())) > _MEASURED:
        yield f"(padding and targets are measured on {_MEASURED} rows of each)"
    held_out = (f"{name} {len(rows):,} rows" for name, rows in data.validation.items())
    yield f"held out: {', '.join(held_out)}; tokenizer: {data.tokenizer.vocab_size:,} tokens"


def _measure(rows, by_row: bool) -> tuple[float, float, float | None]:
    """Share of padding, targets a row, and their share of the tokens; None for a row's targets."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MEASURED)).astype(int))
    padding = places = tokens = targets = 0
    for row in chosen:
        batch = rows.batch([row], [0])
        for name in ("segment_ids", "encoder_segment_ids"):
            if name in batch:
                padding += int((batch[name] == 0).sum())
                places += batch[name].size
        tokens += int((batch["segment_ids"] > 0).sum())
        targets += 1 if by_row else int((batch["loss_mask"] > 0).sum())
    share = None if by_row else targets / max(tokens, 1)
    return padding / places, targets / len(chosen), share
