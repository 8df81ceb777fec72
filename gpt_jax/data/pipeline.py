"""From a DataConfig to batches: prepare once, then read any batch of the endless order directly."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.data.config import DataConfig
from gpt_jax.data.documents import TRAIN, VALIDATION, Documents
from gpt_jax.data.hashing import digest
from gpt_jax.data.mixture import Mixture
from gpt_jax.data.order import global_rows
from gpt_jax.data.packing import PADDING_ROW, Rows, SomeRows, TokenRows
from gpt_jax.data.sources import TOKEN_ROWS, find_files, open_source
from gpt_jax.data.stream import FORMAT, prepare_stream
from gpt_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

# A BPE learns nothing more from text beyond this.
_BPE_BYTES = 100_000_000
_NUM_THREADS = 2
_PREFETCHED_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A corpus ready to train on.

    Attributes:
      tokenizer: what a run keeps as its tokenizer.json.
      train: what is trained on.
      validation: held-out rows by the name that their results get: "validation", or a task's.
      fingerprint: changes whenever a training batch does: tokens, tokenizer, row length.
      description: JSON types, for the receipt: corpus with version, counts, skipped documents.
      template: of the conversations in it, which a run keeps beside its tokenizer; None: there are
        none.
    """

    tokenizer: Tokenizer
    train: Mixture
    validation: dict[str, Any]
    fingerprint: str
    description: dict
    template: ChatTemplate | None = None

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint remembers of the data, by split."""
        held_out = {name: rows.fingerprint for name, rows in self.validation.items()}
        return {TRAIN: self.fingerprint, **held_out}

    def check_fingerprints(self, saved: dict[str, str]) -> None:
        """Raises ValueError if these are not the data that `saved` was taken of."""
        for split, fingerprint in self.fingerprints().items():
            if fingerprint != saved.get(split):
                raise ValueError(
                    f"data: the {split} split has fingerprint {fingerprint}, but the run's is "
                    f"{saved.get(split)}; the text or the tokenizer has changed"
                )


def prepare(config: DataConfig, cache_dir, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Finds the corpus, trains or loads its tokenizer, tokenises it; all kept under `cache_dir`.

    Args:
      config: what to read.
      cache_dir: a folder that may be deleted at any time; hosts may share it.
      tokenizer: the one a run already keeps; `config.tokenizer` is then not looked at.

    Raises:
      ValueError: see DataConfig, open_source and load_tokenizer.
    """
    kind, files = find_files(config.path, config.pattern) if config.path else ("", [])
    if kind == TOKEN_ROWS:
        tokenizer = tokenizer or given_tokenizer(config)
        if tokenizer is None:
            raise ValueError(
                "data.tokenizer: 'bpe' cannot be trained on token rows; "
                "give 'bytes' or the tokenizer.json that made them"
            )
        label = config.path
        rows = _token_rows(config, files, tokenizer, cache_dir)
    else:
        documents = {split: open_source(config, split, cache_dir) for split in (TRAIN, VALIDATION)}
        if tokenizer is None:
            tokenizer = given_tokenizer(config)
        if tokenizer is None:
            tokenizer = _trained_tokenizer(documents[TRAIN], config, cache_dir)
        label = documents[TRAIN].label
        rows = {
            split: _tokenised(texts, split, config.seq_len, tokenizer, cache_dir)
            for split, texts in documents.items()
        }
    train = _some(rows[TRAIN], config.train_tokens)
    held_out = {VALIDATION: rows[VALIDATION]}
    return prepared(config, label, tokenizer, Mixture({TRAIN: train}), held_out)


def _some(rows: Any, num_tokens: int) -> Any:
    if num_tokens > rows.num_tokens:
        raise ValueError(
            f"data.train_tokens: {num_tokens} is more than the training split has, "
            f"{rows.num_tokens}"
        )
    return SomeRows(rows, -(-num_tokens // rows.seq_len)) if num_tokens else rows


def prepared(
    config: DataConfig, label: str, tokenizer: Tokenizer, train: Mixture, validation: dict
) -> PreparedData:
    """Puts rows and their description together.

    Args:
      config: where row length and tokenizer come from.
      label: names the corpus.
      tokenizer: made the rows.
      train, validation: see PreparedData.
    """
    fingerprint = digest(train.fingerprint, tokenizer.fingerprint, config.seq_len)
    description = {
        "name": label,
        "fingerprint": fingerprint,
        "seq_len": config.seq_len,
        "tokenizer": {
            "kind": config.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": tokenizer.eos_token,
            "fingerprint": tokenizer.fingerprint,
        },
        TRAIN: _counts(train),
        **{name: _counts(rows) for name, rows in validation.items()},
    }
    if len(train.parts) > 1:
        description["mixture"] = {
            name: {**_counts(part), "share": train.shares[name]}
            for name, part in train.parts.items()
        }
    return PreparedData(tokenizer, train, validation, fingerprint, description)


def train_batches(
    rows: Mixture,
    seed: int,
    batch_size: int,
    start_index: int,
    local_rows: np.ndarray | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The endless training batches from `start_index` on, read ahead in background threads.

    Starting costs the same at any index.  What a batch holds depends on `rows`, `seed`,
    `batch_size` and its index alone.

    Args:
      rows: what to read.
      seed: chooses the order.
      batch_size: rows in the global batch.
      start_index: the first batch to give.
      local_rows: positions in the global batch that this host needs, int[b]; default all.

    Yields:
      The index of a batch, and this host's rows of it: see `Rows.batch`, with B = len(local_rows).

    Raises:
      ValueError: a file was damaged; whatever reading raises comes out of `next`.
    """
    import grain

    batches = _Batches(rows, seed, batch_size, start_index, local_rows)
    options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def evaluation_batches(
    rows: Rows | TokenRows,
    batch_size: int,
    local_rows: np.ndarray | None = None,
    max_batches: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """All rows once, in order; the last batch is filled up with rows of padding.

    With `max_batches` it is that many batches of rows from all over the split, always the same.

    Args:
      rows: what to read.
      batch_size: rows in the global batch.
      local_rows: positions in the global batch that this host needs, int[b]; default all.
      max_batches: how many at most; 0 reads all rows.

    Yields:
      This host's rows: see `Rows.batch`, with B = len(local_rows).
    """
    order = np.arange(len(rows))
    if max_batches and max_batches * batch_size < len(rows):
        # Evenly spaced: the first rows alone would be the first few documents.
        order = order[np.arange(max_batches * batch_size) * len(rows) // (max_batches * batch_size)]
    order = np.pad(order, (0, -len(order) % batch_size), constant_values=PADDING_ROW)
    for row_ids in order.reshape(-1, batch_size):
        yield rows.batch(row_ids if local_rows is None else row_ids[local_rows])


class _Batches:
    """A random-access source: item i is batch start_index + i.  Grain gives the threads."""

    def __init__(self, rows, seed, batch_size, start_index, local_rows):
        self._rows = rows
        self._seed = seed
        self._batch_size = batch_size
        self._start_index = start_index
        self._local_rows = local_rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int):
        index = self._start_index + int(i)
        batch = self._rows.batch(self._seed, self._batch_size, index, self._local_rows)
        return index, batch

    def __repr__(self) -> str:  # Grain prints its sources
        return f"batches of {self._batch_size} from {self._start_index}"


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that a config names; None where it is to be trained."""
    if config.tokenizer == "bpe":
        return None
    if config.tokenizer == "bytes":
        return byte_tokenizer(config.special_tokens)
    return load_tokenizer(config.tokenizer, config.eos_token)


def _trained_tokenizer(documents: Documents, config: DataConfig, cache_dir) -> Tokenizer:
    texts, label = _sample(documents), documents.label
    return trained_tokenizer(texts, documents.fingerprint, label, config, cache_dir)


def trained_tokenizer(
    texts: Iterator[str], fingerprint: str, label: str, config: DataConfig, cache_dir
) -> Tokenizer:
    """A BPE of the texts, trained once and kept in the cache.

    Args:
      texts: read only if it is not there yet.
      fingerprint: changes whenever the texts do.
      label: names them in messages.
      config: size and special tokens.
      cache_dir: see `prepare`.

    Raises:
      ValueError: there is no text.
    """
    vocab_size, special = config.vocab_size, config.special_tokens
    key = digest("bpe", FORMAT, fingerprint, vocab_size, special, _BPE_BYTES)
    path = Path(cache_dir) / "tokenizers" / f"{key}.json"
    if not path.exists():
        first = next(texts, None)
        if first is None:
            raise ValueError(f"data: {label} holds no text")
        trained = train_bpe(itertools.chain([first], texts), vocab_size, special)
        trained.save(path)
        if trained.vocab_size < vocab_size:
            print(
                f"warning: data.vocab_size: {vocab_size} asked for, "
                f"but the text has pairs for {trained.vocab_size} only",
                file=sys.stderr,
            )
    # Read back even when just made: a restart must hold the very same object.
    return load_tokenizer(path)


def _sample(documents: Documents) -> Iterator[str]:
    """About 100 MB of the texts, from all over the corpus where it can be read in any order."""
    order = range(len(documents))
    if documents.random_access:
        order = (int(global_rows(0, len(documents), 1, i)[0]) for i in order)
    left = _BPE_BYTES
    for i in order:
        text = documents[i]
        if text:
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return


def _tokenised(documents: Documents, split, seq_len, tokenizer, cache_dir) -> Rows:
    key = digest("tokens", FORMAT, documents.fingerprint, tokenizer.fingerprint)
    folder = Path(cache_dir) / "tokens" / key / split
    stream = prepare_stream(documents, tokenizer, folder, f"tokenising {split}")
    return Rows(stream, seq_len, tokenizer.vocab_size, tokenizer.eos_id)


def _token_rows(config, files, tokenizer, cache_dir) -> dict[str, TokenRows]:
    def make(paths, span=(0.0, 1.0)):
        size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
        return TokenRows(paths, config.seq_len, size, eos_id, cache_dir, span)

    if config.validation_path:
        kind, held_out = find_files(config.validation_path, config.pattern, "validation_path")
        if kind != TOKEN_ROWS:
            raise ValueError(
                f"data.validation_path: {config.validation_path!r} holds {kind}, "
                "but data.path holds token rows"
            )
        return {TRAIN: make(files), VALIDATION: make(held_out)}
    border = 1.0 - config.validation_fraction
    rows = {TRAIN: make(files, (0.0, border)), VALIDATION: make(files, (border, 1.0))}
    if not len(rows[TRAIN]) or not len(rows[VALIDATION]):
        raise ValueError(
            f"data.path: {config.path!r} holds one row; give data.validation_path, or more rows"
        )
    return rows


def _counts(rows: Any) -> dict:
    return {
        "rows": len(rows),
        "tokens": rows.num_tokens,
        "bytes": rows.num_bytes,
        "documents": rows.num_documents,
        "skipped": len(rows.skipped),
        "skipped_documents": list(rows.skipped[:20]),
        "fingerprint": rows.fingerprint,
    }
