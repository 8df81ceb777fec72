"""How single tokens are written, where they stand, and the two shapes of log-probabilities."""

import pytest
import tokenizers as hf
from serve_fixtures import EOS, TOKENIZER

from gpt_jax.data.tokenizers import Tokenizer, train_bpe
from gpt_jax.decode.request import Token
from gpt_jax.serve.generation import Piece
from gpt_jax.serve.logprobs import (
    Aligner,
    Placed,
    chat_logprobs,
    completion_logprobs,
    prompt_offsets,
)
from gpt_jax.serve.token_text import TokenTexts

TEXTS = TokenTexts(TOKENIZER)


def sentencepiece_like():
    """A tokenizer as Llama's: spaces are a character of their own, unknown bytes are tokens."""
    pieces = ["</s>", "\u2581", "\u2581Hi", "a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    model = hf.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
    )
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Sequence([
        hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer, "</s>")


def test_bytes_of_tokens():
    assert TEXTS.bytes(97) == b"a" and TEXTS.text(97) == "a"
    assert TEXTS.bytes(0xE2) == b"\xe2" and TEXTS.text(0xE2) == "bytes:\\xe2"
    assert TEXTS.text(EOS) == "<|endoftext|>"
    for tokenizer in (TOKENIZER, train_bpe(["the cafés of Zürich \U0001f642"] * 9, 300)):
        texts, text = TokenTexts(tokenizer), "the cafés\n of 東京 \U0001f642"
        assert b"".join(map(texts.bytes, tokenizer.encode(text))) == text.encode()


def test_tokens_of_other_tokenizers_keep_their_spaces():
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    assert texts.text(2) == " Hi" and texts.text(0) == "</s>"
    assert texts.bytes(5 + 0xE2) == b"\xe2" and texts.text(5 + 0xE2) == "bytes:\\xe2"


def test_offsets_of_prompts():
    text, offsets = prompt_offsets(TOKENIZER, "a\u20acb")
    assert (text, offsets) == ("a\u20acb", [0, 1, 1, 1, 2])
    ids = [EOS, *"a\u20acb".encode(), 0xE2]
    assert prompt_offsets(TOKENIZER, ids) == ("a\u20acb\ufffd", [0, 0, 1, 1, 1, 2, 3])


def pieces_of(*parts):
    """Pieces of one text: (text, ids, finish_reason, by_string)."""
    return [
        Piece(
            0,
            0,
            text,
            tuple(Token(i, -1.0) for i in ids),
            reason,
            by_string,
            by_id=reason == "stop" and not by_string,
        )
        for text, ids, reason, by_string in parts
    ]


@pytest.mark.parametrize(
    ("parts", "released"),
    [
        # Half of a character waits for the other.
        ([("", [0xC3], None, False), ("é", [0xA9], "length", False)], [[], [(0, 0xC3), (0, 0xA9)]]),
        # What may begin a stop string waits, and never comes if it does.
        ([("a", [97, 98], None, False), ("", [99], "stop", True)], [[(0, 97)], []]),
        ([("a", [97, 98], None, False), ("bd", [100, EOS], "stop", False)],
         [[(0, 97)], [(1, 98), (2, 100)]]),
        # A stop string may begin within a token's text: that token is shown.
        ([("", [0xC3], None, False), ("", [0xA9], "stop", True)], [[], []]),
        ([("", [EOS], "stop", False)], [[]]),
        ([("", [], "length", False)], [[]]),
    ],
)  # fmt: skip
def test_tokens_come_with_their_text(parts, released):
    aligner = Aligner(TOKENIZER)
    found = [[(p.offset, p.token.id) for p in aligner.put(piece)] for piece in pieces_of(*parts)]
    assert found == released


def test_the_token_itself_is_among_the_likely_ones():
    token = Token(97, -3.0, ((98, -0.1), (99, -0.5), (100, -0.6)))
    found = completion_logprobs([Placed(token, 4)], 2, TEXTS)
    assert found == {
        "tokens": ["a"], "token_logprobs": [-3.0], "text_offset": [4],
        "top_logprobs": [{"b": -0.1, "c": -0.5, "a": -3.0}],
    }  # fmt: skip
    # The same number in both places, whatever rounding did to one of them.
    token = Token(97, -0.1, ((97, -0.1000001),))
    found = completion_logprobs([Placed(token, 0)], 1, TEXTS)
    assert found["top_logprobs"] == [{"a": -0.1}]
    assert completion_logprobs([Placed(token, 0)], 0, TEXTS)["top_logprobs"] is None


def test_numbers_that_json_does_not_have():
    token = Token(97, float("-inf"), ((98, 0.0), (99, float("-inf"))))
    found = completion_logprobs([Placed(token, 0)], 2, TEXTS)
    assert found["token_logprobs"] == [-9999.0] and found["top_logprobs"][0]["c"] == -9999.0
    found = chat_logprobs([Placed(token, 0)], 2, TEXTS)["content"][0]
    assert (found["logprob"], found["bytes"]) == (-9999.0, [97])
    assert [top["logprob"] for top in found["top_logprobs"]] == [0.0, -9999.0]
