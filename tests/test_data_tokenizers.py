"""Tokenizers: exact round trips, streaming, and texts that quote the special token."""

import json
import random

import pytest
import tokenizers as hf

from gpt_jax.data.tokenizers import (
    EOS_TOKEN,
    byte_tokenizer,
    load_tokenizer,
    text_pieces,
    train_bpe,
)

CODE = 'def f(x):\n    """Returns x."""\n    if x > 10:\n        return x.value + 12345\n\n\n' * 30
HARD = (
    "👍🏽 한국어 naïve\r\n\t\tẞ \x00\x7f e\u0301 "
    "\u200d👩\u200d👧 \ufeff <|endoftext|> \ufffd end \n\n   "
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CODE, HARD, "the cat sat on the mat. " * 20], 400)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return byte_tokenizer() if request.param == "bytes" else bpe


def random_text(rng):
    alphabets = [
        lambda: chr(rng.randrange(128)),
        lambda: rng.choice(" \n\t\r"),
        lambda: chr(rng.randrange(0xD800)),
        lambda: chr(rng.randrange(0xE000, 0x110000)),
        lambda: bytes(rng.randrange(256) for _ in range(4)).decode("utf-8", "replace"),
    ]
    return "".join(rng.choice(alphabets)() for _ in range(rng.randrange(40)))


def test_round_trip_is_exact(tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)] + [CODE, HARD, "", "\x00"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_byte_ids_are_the_byte_values():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(HARD) == list(HARD.encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_quoted_end_of_text_is_not_the_end_of_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = each.encode(f"a{EOS_TOKEN}b")
        assert each.eos_id not in ids
        assert each.decode(ids) == f"a{EOS_TOKEN}b"


def test_decode_leaves_the_end_of_text_out(tokenizer):
    ids = [tokenizer.eos_id, *tokenizer.encode("ab"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{EOS_TOKEN}ab{EOS_TOKEN}"


def stream(tokenizer, ids):
    streamer = tokenizer.streamer()
    return [streamer.put(i) for i in ids] + [streamer.flush()]


def test_streaming_gives_what_decode_gives(tokenizer):
    for text in (HARD, CODE, "한", "👍🏽"):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_broken_bytes_gives_what_decode_gives(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 12))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_shows_an_unfinished_character_at_the_end():
    tokenizer = byte_tokenizer()
    assert stream(tokenizer, b"a\xe2\x82") == ["a", "", "", "\ufffd"]


def test_streaming_a_tokenizer_with_word_marks():
    model = hf.models.WordLevel(
        {"▁a": 0, "▁b": 1, "c": 2, "</s>": 3, "<unk>": 4}, unk_token="<unk>"
    )
    raw = hf.Tokenizer(model)
    raw.decoder = hf.decoders.Metaspace()
    raw.add_special_tokens(["</s>"])
    from gpt_jax.data.tokenizers import Tokenizer

    tokenizer = Tokenizer(raw, "</s>")
    assert (
        "".join(stream(tokenizer, [0, 1, 2, 3, 1])) == tokenizer.decode([0, 1, 2, 3, 1]) == "a bc b"
    )
    assert tokenizer.token_bytes() is None
    # What continues a text begins with the space between; an answer, and what stands behind a
    # special token, does not.
    for before, text in (([0], " bc"), ([2], " bc"), ([], "bc"), ([0, 3], "bc")):
        streamer = tokenizer.streamer(before)
        assert streamer.put(1) + streamer.put(2) + streamer.flush() == text, before


def test_token_bytes_add_up(tokenizer):
    sizes = tokenizer.token_bytes()
    for text in (HARD, CODE):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == 0


def test_training_is_deterministic_and_saved_files_are_equal(bpe, tmp_path):
    again = train_bpe([CODE, HARD, "the cat sat on the mat. " * 20], 400)
    assert again.fingerprint == bpe.fingerprint != train_bpe([CODE], 400).fingerprint
    bpe.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint
    assert (loaded.eos_id, loaded.vocab_size) == (bpe.eos_id, bpe.vocab_size)
    assert loaded.encode(CODE) == bpe.encode(CODE)


def test_indentation_becomes_one_token(bpe):
    assert any(piece == "\n       " for piece in map(bpe.decode, [[i] for i in bpe.encode(CODE)]))


def test_vocabulary_holds_what_was_asked_for():
    assert train_bpe([CODE * 3, HARD], 300).vocab_size == 300
    with pytest.raises(ValueError, match=r"data.vocab_size: 256 is below 257"):
        train_bpe([CODE], 256)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"text: character 1 is half of a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_long_texts_are_cut_at_line_ends_and_encode_alike(bpe):
    text = "".join(f"line {i}:\n    x = {i}\n" for i in range(9000))
    pieces = list(text_pieces(text))
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(piece.endswith("\n") and len(piece) <= 1 << 16 for piece in pieces)
    assert bpe.joinable
    assert list(text_pieces("a" * (1 << 17) + "b")) == ["a" * (1 << 16)] * 2 + ["b"]


def test_foreign_end_of_text_tokens(tmp_path):
    raw = hf.Tokenizer(hf.models.WordLevel({"a": 0, "[unk]": 1, "STOP": 2}, unk_token="[unk]"))
    raw.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    raw.save(str(path))
    with pytest.raises(ValueError, match=r"data.eos_token: .* holds none of .*</s>"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"data.eos_token: 'HALT' is not in the vocabulary"):
        load_tokenizer(path, "HALT")
    assert load_tokenizer(path, "STOP").eos_id == 2
    raw.add_special_tokens(["</s>"])
    raw.post_processor = hf.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 3)]
    )
    raw.save(str(path))
    assert load_tokenizer(path).eos_id == 3
    assert load_tokenizer(path).encode("a a") == [0, 0]


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"data.tokenizer: .*absent.* does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"data.tokenizer: .* is no tokenizer.json"):
        load_tokenizer(tmp_path)
