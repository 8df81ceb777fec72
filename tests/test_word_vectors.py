"""Word vectors: files, embeddings made of them, and vectors trained by skip-gram."""

import gzip

import numpy as np
import pytest

from gpt_jax.data.skipgram import _loss, train_skipgram
from gpt_jax.data.tokenizers import byte_tokenizer, train_bpe
from gpt_jax.data.word_vectors import (
    embedding_from_vectors,
    read_word_vectors,
    scaled_embedding,
    write_word_vectors,
)


def read(path, text=None, wanted=None):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {word: vector.tolist() for word, vector in read_word_vectors(path, wanted)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "v.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and The dog ran. " * 50], 300, ("<pad>",))


@pytest.mark.parametrize(
    "text",
    [
        "2 3\nthe 1 2 3\nat me 4 5e-1 -6\n",  # word2vec
        "2 3\r\nthe 1 2 3 \r\nat me 4 5e-1 -6 \r\n",  # with spaces at the ends of lines
        "the 1 2 3\nat me 4 5e-1 -6",  # GloVe
        "the 1 2 3\n\nat me 4 5e-1 -6\n\n",
    ],
)
def test_both_formats(path, text):
    assert read(path, text) == {"the": [1, 2, 3], "at me": [4, 0.5, -6]}
    assert read(path, wanted={"at me"}) == {"at me": [4, 0.5, -6]}


def test_words_that_look_like_something_else(path):
    words = ["12", "0.5", "\u00a0", "\u2028", "\x85", "中", " the", "1 2"]
    text = "".join(f"{word} {i} {i}\n" for i, word in enumerate(words))
    assert list(read(path, text)) == words
    assert list(read(path, b"cut\xe4\xb8 1 2\n")) == ["cut\ufffd"]


def test_what_is_written_is_read(tmp_path):
    words = ["the", " the", "a b", "中", "7"]
    vectors = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    write_word_vectors(tmp_path / "v.txt", words, vectors)
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress((tmp_path / "v.txt").read_bytes()))
    for name in ("v.txt", "v.txt.gz"):
        again = list(read_word_vectors(tmp_path / name))
        assert [word for word, _ in again] == words
        assert np.array_equal([vector for _, vector in again], vectors)
    for word in ("", "a\nb"):
        with pytest.raises(ValueError, match=r"^words: "):
            write_word_vectors(tmp_path / "w.txt", [word], vectors[:1])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("the 1 2 3\ncat 1 2\n", "line 2 has 2 numbers behind a word, not 3"),
        ("2 3\nthe 1 2 3\ncat 1 2\n", "line 3 has 2 numbers"),
        ("the 1 2\ncat 1 x2\n", "line 2 holds 'x2' where a number"),
        ("the 1 2\ncat 1 nan\n", "line 2 holds a number that is not finite"),
        ("3 2\nthe 1 2\ncat 3 4\n", "line 3 is the last, after 2 words of 3"),
        ("1 2\nthe 1 2\ncat 3 4\n", "line 3 is the last, after 2 words of 1"),
        ("the\ncat\n", "line 1 has 0 numbers behind a word, not any"),
        ("", "line 0 is the last, after 0 words of any"),
        (b"1 2\nthe \x00\x00\x80\x3f\x00\x00\x80\x3f", "line 2 has 1 numbers"),
    ],
)
def test_bad_files_are_named_with_the_line(path, text, problem):
    with pytest.raises(ValueError, match=f"^init.word_vectors: .*v.txt: {problem}"):
        read(path, text)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"^init.word_vectors: .*no.txt' cannot be read"):
        read(tmp_path / "no.txt")
    (tmp_path / "v.gz").write_bytes(b"the 1 2\n")
    with pytest.raises(ValueError, match=r"^init.word_vectors: .*v.gz' cannot be read"):
        read(tmp_path / "v.gz")


def test_tokens_get_the_vectors_of_their_words(path, tokenizer):
    path.write_text("the 3 4\nthe 9 9\nTHE 8 8\ncat 6 8\ndog 0 5\n")
    matrix, share = embedding_from_vectors(path, tokenizer, 2, seed=1, std=0.1)
    assert matrix.shape == (tokenizer.vocab_size, 2) and matrix.dtype == np.float32
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    found = [text.strip() in ("the", "The", "cat", "dog") for text in texts]
    assert share == pytest.approx(np.mean(found)) and sum(found) >= 4
    scale = matrix[texts.index(" cat")][0] / 6
    for text, vector in {" the": (3, 4), " The": (3, 4), " cat": (6, 8)}.items():
        np.testing.assert_allclose(matrix[texts.index(text)], np.multiply(vector, scale), 1e-6)
    assert np.sqrt(np.mean(matrix[found] ** 2)) == pytest.approx(0.1, rel=1e-5)
    rest = matrix[~np.array(found)]
    assert rest.std() == pytest.approx(0.1, rel=0.1) and len(np.unique(rest)) == rest.size
    assert np.array_equal(matrix, embedding_from_vectors(path, tokenizer, 2, 1, 0.1)[0])
    other = embedding_from_vectors(path, tokenizer, 2, 2, 0.1)[0]
    assert np.array_equal(matrix[found], other[found]) and not np.array_equal(matrix, other)


def test_files_that_do_not_fit_the_model(path, tokenizer):
    path.write_text("2 3\nthe 1 2 3\ncat 1 2 3\n")
    with pytest.raises(ValueError, match=r"has vectors of 3 numbers, but model.embed_dim is 4"):
        embedding_from_vectors(path, tokenizer, 4, 0)
    with pytest.raises(ValueError, match="for no token"):
        embedding_from_vectors(path, byte_tokenizer(), 3, 0)


def test_nothing_found_is_the_models_own_initialisation():
    matrix = scaled_embedding(np.zeros((500, 20)), np.zeros(500, bool), 0, 0.05)
    assert matrix.std() == pytest.approx(0.05, rel=0.05)


# --- skip-gram

SLOTS = 12


def planted(size, seed=0):
    """A walk over slots; each slot is filled by one of two tokens, i or i + SLOTS, at random."""
    rng = np.random.default_rng(seed)
    following = np.array([rng.permutation(SLOTS)[:3] for _ in range(SLOTS)])
    slots, steps = [0], rng.integers(0, 3, size)
    for step in steps[1:]:
        slots.append(following[slots[-1], step])
    return np.array(slots) + SLOTS * rng.integers(0, 2, size)


@pytest.fixture(scope="module")
def trained():
    return train_skipgram(planted(20_000), 2 * SLOTS + 1, 16, window=2, batch=8, subsample=1.0)


def test_tokens_of_the_same_surroundings_end_up_nearest(trained):
    unit = trained[:-1] / np.linalg.norm(trained[:-1], axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(2 * SLOTS)
    twins = (np.arange(2 * SLOTS) + SLOTS) % (2 * SLOTS)
    assert np.array_equal(cosines.argmax(1), twins)
    assert not trained[-1].any()  # a token that the text lacks


def test_the_seed_decides(trained):
    tokens = planted(20_000)
    options = dict(window=2, batch=8, subsample=1.0)
    assert np.array_equal(train_skipgram(tokens, 2 * SLOTS + 1, 16, **options), trained)
    assert not np.array_equal(train_skipgram(tokens, 2 * SLOTS + 1, 16, seed=1, **options), trained)


def test_texts_shorter_than_a_batch():
    vectors = train_skipgram(np.array([3, 1]), 5, 4, epochs=1, batch=8)
    assert np.isfinite(vectors).all() and vectors[[1, 3]].any(1).all()
    with pytest.raises(ValueError, match=r"^init.word_vectors: 1 tokens"):
        train_skipgram(np.array([3]), 5, 4)


def test_the_loss_is_the_papers():
    rng = np.random.default_rng(0)
    center, true, drawn = (rng.normal(size=(2, n, 3)).astype(np.float32) for n in (6, 6, 4))
    reach = rng.integers(1, 4, (2, 6))
    expected = 0.0
    for row in range(2):
        for i in range(6):
            for j in range(max(i - reach[row, i], 0), min(i + reach[row, i] + 1, 6)):
                if j != i:
                    expected += np.log1p(np.exp(-center[row, i] @ true[row, j]))
                    others = np.log1p(np.exp(drawn[row] @ center[row, i]))
                    expected += 5 * others.mean()
    np.testing.assert_allclose(_loss(center, true, drawn, reach, 5 / 4), expected, rtol=1e-5)
