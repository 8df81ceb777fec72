"""Pretrained word vectors, in the text formats of word2vec and GloVe, as first token embeddings.

V entries in the vocabulary, D numbers a vector.
"""

import gzip
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt_jax.data.hashing import write_atomically
from gpt_jax.data.tokenizers import Tokenizer


def read_word_vectors(
    path, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Words and their vectors, in the order of the file.

    A line is a word and D numbers; word2vec's format has a line "count D" before them.  The last D
    fields are the numbers, so that a word may hold spaces.  Bytes of a word that are no UTF-8
    become U+FFFD: word2vec cuts long words inside of characters.

    Args:
      path: the file; a name in .gz is decompressed.
      wanted: the words to yield; the numbers of others are not read.  None: all.

    Yields:
      (word, float32[D]).

    Raises:
      ValueError: names file and line: too few fields, what is no finite number, or another number
        of lines than the first one says.
    """
    path = Path(path)
    count = dim = None
    number = words = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8", "replace").rstrip("\r\n ")
                if number == 1:
                    count, dim = _header(text)
                    if count is not None:
                        continue
                if not text:
                    continue
                word, *fields = text.rsplit(" ", dim)
                if len(fields) != dim or not dim:
                    raise _wrong(
                        path, number, f"has {len(fields)} numbers behind a word, not {dim or 'any'}"
                    )
                words += 1
                if wanted is None or word in wanted:
                    yield word, _numbers(fields, path, number)
    except (OSError, EOFError) as error:
        raise ValueError(f"init.word_vectors: {str(path)!r} cannot be read: {error}") from None
    if dim is None or (count is not None and words != count):
        raise _wrong(path, number, f"is the last, after {words} words of {count or 'any'}")


def write_word_vectors(path, words: Sequence[str], vectors_WD: np.ndarray) -> None:
    """Writes word2vec's text format; reading it gives the same words and bits.

    Raises:
      ValueError: a word is empty or holds a line end.
    """
    lines = [f"{len(words)} {vectors_WD.shape[1]}"]
    for word, vector in zip(words, vectors_WD, strict=True):
        if not word or "\n" in word or "\r" in word:
            raise ValueError(f"words: {word!r} cannot be a word of a text file of vectors")
        lines.append(" ".join([word, *(f"{value:.9g}" for value in vector)]))
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def embedding_from_vectors(
    path, tokenizer: Tokenizer, embed_dim: int, seed: int, std: float = 0.02
) -> tuple[np.ndarray, float]:
    """First token embeddings out of a file of word vectors.

    A token gets the vector of its text without the white space around it, else that of its lower
    case (most published vectors have no other).  So " The" and "the" may share one; and so may the
    piece of a longer word that happens to be a word.  Special tokens, pieces of characters and what
    the file lacks are drawn at random: see `scaled_embedding`.

    Args:
      path: see `read_word_vectors`.
      tokenizer: whose vocabulary the rows stand for.
      embed_dim: D of the model, and of the file.
      seed: of the rows that are drawn.
      std: what the model's own initialisation has.

    Returns:
      (float32[V, D], share of the V tokens that the file covers).

    Raises:
      ValueError: the file is not well-formed, has another D, or covers no token at all.
    """
    texts = [_text(tokenizer, token_id) for token_id in range(tokenizer.vocab_size)]
    wanted = {text for text in texts if text} | {text.lower() for text in texts if text}
    dim = _dim(path)
    if dim != embed_dim:
        raise ValueError(
            f"init.word_vectors: {str(path)!r} has vectors of {dim} numbers, but model.embed_dim "
            f"is {embed_dim}"
        )
    vectors: dict[str, np.ndarray] = {}
    for word, vector in read_word_vectors(path, wanted):
        vectors.setdefault(word, vector)  # the first is the more frequent
    matrix_VD = np.zeros((tokenizer.vocab_size, embed_dim), np.float32)
    found_V = np.zeros(tokenizer.vocab_size, bool)
    for token_id, text in enumerate(texts):
        vector = vectors.get(text) if text in vectors else vectors.get(text.lower())
        if text and vector is not None:
            matrix_VD[token_id], found_V[token_id] = vector, True
    if not found_V.any():
        raise ValueError(
            f"init.word_vectors: {str(path)!r} has a vector for no token of the vocabulary"
        )
    return scaled_embedding(matrix_VD, found_V, seed, std), float(found_V.mean())


def scaled_embedding(
    vectors_VD: np.ndarray, found_V: np.ndarray, seed: int, std: float = 0.02
) -> np.ndarray:
    """Vectors on the scale of a model's own initialisation, and random rows where there are none.

    The rows found are multiplied by one number, so that angles and ratios of lengths stay; the root
    mean square of their entries is then `std`.  The others are drawn from N(0, std^2), as without
    any vectors.

    Args:
      vectors_VD: float[V, D].
      found_V: bool[V], the rows that mean something.
      seed: of the others.
      std: wanted.

    Returns:
      float32[V, D].
    """
    drawn = np.random.default_rng(seed).normal(0.0, std, vectors_VD.shape)
    size = (
        np.sqrt(np.mean(np.square(vectors_VD[found_V], dtype=np.float64))) if found_V.any() else 0
    )
    scale = std / size if size else 1.0
    return np.where(found_V[:, None], vectors_VD * scale, drawn).astype(np.float32)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token says, without white space; "" for those that are no text of their own."""
    text = tokenizer.decode([token_id])
    return "" if "\ufffd" in text else text.strip()


def _header(line: str) -> tuple[int | None, int]:
    """(count, D) of a file by its first line; there is no count in GloVe's format."""
    fields = line.split(" ")
    if len(fields) == 2 and all(field.isdecimal() for field in fields):
        return int(fields[0]), int(fields[1])
    return None, len(fields) - 1


def _dim(path) -> int:
    _, vector = next(iter(read_word_vectors(path)), (None, ()))
    return len(vector)


def _numbers(fields: list[str], path: Path, number: int) -> np.ndarray:
    try:
        vector = np.array(fields, np.float32)
    except ValueError:
        bad = next(field for field in fields if not _is_number(field))
        raise _wrong(path, number, f"holds {bad!r} where a number should be") from None
    if not np.isfinite(vector).all():
        raise _wrong(path, number, "holds a number that is not finite")
    return vector


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _wrong(path: Path, number: int, problem: str) -> ValueError:
    return ValueError(f"init.word_vectors: {path}: line {number} {problem}")
