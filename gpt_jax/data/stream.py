"""A split as one flat stream of tokens on disk: tokenised once, in chunks, and kept.

    eos document eos document eos ... document eos

The end-of-text token ends a document and begins the next one.  Documents without text are left
out.  A chunk is a run of whole documents, written under a unique name and then renamed, with its
counts in a JSON file that is renamed after it; `manifest.json` comes last.  So an interrupted
preparation goes on after its last whole chunk, and hosts that share the folder write the same
bytes over one another without harm.
"""

import dataclasses
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt_jax.data.documents import Documents
from gpt_jax.data.hashing import digest, file_digest, write_atomically
from gpt_jax.data.tokenizers import Tokenizer, text_pieces

FORMAT = 1
CHUNK_BYTES = 8 << 20  # of text
_ENCODE_BYTES = 1 << 20  # of text at once: bounds what the tokenizer library holds in memory
# Files up to this many bytes are checked by their digests when a stream is opened, a second's
# work; larger streams by their sizes, and every token read from any of them by its range.
_DIGEST_BYTES = 1 << 29
_OPEN_CHUNKS = 64


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Counts of one chunk; its tokens are in `name`, its documents are [first, end)."""

    name: str
    first: int
    end: int
    last: bool
    num_tokens: int
    num_bytes: int
    num_documents: int
    skipped: tuple[str, ...]
    file_size: int
    file_digest: str


class Stream:
    """The tokens of a split, read from its chunks as they are needed.

    Attributes:
      folder: where its files are.
      num_tokens, num_bytes, num_documents: of the whole stream; bytes are the UTF-8 bytes of the
        documents' text, the denominator of bits per byte.
      skipped: names of the documents that were left out because they are no UTF-8.
      fingerprint: changes whenever a token does.
    """

    def __init__(self, folder: Path, chunks: list[Chunk]):
        self.folder = folder
        self._chunks = chunks
        self._ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        self.num_tokens = int(self._ends[-1])
        self.num_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.num_documents = sum(chunk.num_documents for chunk in chunks)
        self.skipped = tuple(name for chunk in chunks for name in chunk.skipped)
        self.fingerprint = digest([chunk.file_digest for chunk in chunks])
        # A large corpus has more chunks than a process may hold files open.
        self._tokens_of = functools.lru_cache(_OPEN_CHUNKS)(self._load)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), unsigned integers; fewer at the end of the stream.

        Raises:
          ValueError: a chunk was damaged after it was opened.
        """
        stop = min(stop, self.num_tokens)
        number = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._ends[number])
            base = end - self._chunks[number].num_tokens
            parts.append(self._tokens_of(number)[start - base : min(stop, end) - base])
            start, number = end, number + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _load(self, number: int) -> np.ndarray:
        chunk = self._chunks[number]
        try:
            tokens = np.load(self.folder / chunk.name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokens: {self.folder / chunk.name} cannot be read ({error}); "
                "start again to rebuild it"
            ) from None
        if tokens.shape != (chunk.num_tokens,):
            raise ValueError(
                f"tokens: {self.folder / chunk.name} holds {tokens.shape} tokens, "
                f"not {chunk.num_tokens}; start again to rebuild it"
            )
        return np.asarray(tokens)  # still mapped; a memmap is slow to slice


def prepare_stream(documents: Documents, tokenizer: Tokenizer, folder, title: str = "") -> Stream:
    """Opens the stream in `folder`, tokenising what is not there whole.

    Args:
      documents: the texts of the split.
      tokenizer: turns them into tokens.
      folder: of this split, this tokenizer and these texts alone.
      title: names the work on the progress bar, shown when it takes more than a second.

    Raises:
      ValueError: no document holds text, or one cannot be read.
    """
    folder = Path(folder)
    chunks = _read_manifest(folder)
    if chunks is None:
        folder.mkdir(parents=True, exist_ok=True)
        chunks = list(_make_chunks(documents, tokenizer, folder, title))
        manifest = {"format": FORMAT, "chunks": [dataclasses.asdict(chunk) for chunk in chunks]}
        write_atomically(folder / "manifest.json", json.dumps(manifest).encode())
    stream = Stream(folder, chunks)
    if not stream.num_documents:
        raise ValueError(
            f"data.path: {documents.label} holds no text in its {len(documents)} documents "
            f"({len(stream.skipped)} skipped as no UTF-8)"
        )
    return stream


def _read_manifest(folder: Path) -> list[Chunk] | None:
    """The chunks of a whole stream; None where it is not there, or not as it was written."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        chunks = [_chunk(record) for record in manifest["chunks"]]
    except (ValueError, KeyError, TypeError):
        chunks = []
    deep = sum(chunk.file_size for chunk in chunks) <= _DIGEST_BYTES
    damaged = [chunk.name for chunk in chunks if not _is_whole(folder, chunk, deep)]
    if chunks and chunks[-1].last and not damaged:
        return chunks
    names = ", ".join(damaged[:3]) or path.name
    print(f"warning: {folder}: {names} is damaged; tokenising again", file=sys.stderr)
    return None


def _is_whole(folder: Path, chunk: Chunk, deep: bool) -> bool:
    path = folder / chunk.name
    try:
        if path.stat().st_size != chunk.file_size:
            return False
        return not deep or file_digest(path) == chunk.file_digest
    except OSError:
        return False


def _make_chunks(documents, tokenizer, folder: Path, title: str) -> Iterator[Chunk]:
    """Chunk after chunk, each read back where an earlier attempt left it whole."""
    first, number = 0, 0
    # disable=None: no bar where stderr is not a terminal.
    bar = {"desc": title, "total": len(documents), "unit": "text", "unit_scale": True}
    with tqdm(**bar, delay=1.0, leave=False, disable=None) as progress:
        while True:
            name = f"chunk-{number:05d}.npy"
            chunk = _known_chunk(folder, name, first)
            if chunk is not None:
                progress.update(chunk.end - chunk.first)
            else:
                chunk = _make_chunk(documents, tokenizer, folder, name, first, progress)
            yield chunk
            if chunk.last:
                return
            first, number = chunk.end, number + 1


def _known_chunk(folder: Path, name: str, first: int) -> Chunk | None:
    try:
        chunk = _chunk(json.loads((folder / name).with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return chunk if chunk.first == first and _is_whole(folder, chunk, deep=True) else None


def _make_chunk(documents, tokenizer, folder: Path, name: str, first: int, progress) -> Chunk:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encoder = _Encoder(tokenizer, dtype)
    end, num_bytes, num_documents, skipped = first, 0, 0, []
    while end < len(documents) and num_bytes < CHUNK_BYTES:
        text = documents[end]
        if text is None:
            skipped.append(documents.document_name(end))
        elif text:
            size = encoder.add(text)
            num_bytes, num_documents = num_bytes + size, num_documents + 1
        end += 1
        progress.update()
    last = end == len(documents)
    data = io.BytesIO()
    tokens = encoder.finish(end_of_stream=last)
    np.save(data, tokens)
    data = data.getvalue()
    chunk = Chunk(
        name=name,
        first=first,
        end=end,
        last=last,
        num_tokens=len(tokens),
        num_bytes=num_bytes,
        num_documents=num_documents,
        skipped=tuple(skipped),
        file_size=len(data),
        file_digest=hashlib.blake2b(data, digest_size=16).hexdigest(),
    )
    write_atomically(folder / name, data)
    record = json.dumps(dataclasses.asdict(chunk)).encode()
    write_atomically((folder / name).with_suffix(".json"), record)
    return chunk


class _Encoder:
    """Collects documents' tokens, encoding about a megabyte of text at a time on all cores."""

    def __init__(self, tokenizer: Tokenizer, dtype):
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._parts: list[np.ndarray] = []
        self._texts: list[str | None] = []  # None stands for the end-of-text token
        self._waiting = 0

    def add(self, text: str) -> int:
        """Adds a document; returns its UTF-8 bytes."""
        self._texts.append(None)
        size = 0
        for piece in text_pieces(text) if self._tokenizer.joinable else [text]:
            self._texts.append(piece)
            num_bytes = len(piece.encode())
            size, self._waiting = size + num_bytes, self._waiting + num_bytes
            if self._waiting >= _ENCODE_BYTES:
                self._encode()
        return size

    def finish(self, end_of_stream: bool) -> np.ndarray:
        """All tokens so far."""
        if end_of_stream:
            self._texts.append(None)
        self._encode()
        return np.concatenate([np.zeros(0, self._dtype), *self._parts])

    def _encode(self) -> None:
        encoded = iter(self._tokenizer.encode_batch([t for t in self._texts if t is not None]))
        eos = [self._tokenizer.eos_id]
        for text in self._texts:
            self._parts.append(np.array(eos if text is None else next(encoded), self._dtype))
        self._texts, self._waiting = [], 0


def _chunk(record: dict) -> Chunk:
    return Chunk(**{**record, "skipped": tuple(record["skipped"])})
