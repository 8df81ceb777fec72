"""Text out of tokens: stop strings, whole characters, finish reasons, streams."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.stopping import StopStrings
from gpt_jax.decode.text import Generator, Piece
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer

TOKENIZER = byte_tokenizer()


class ScriptedDecoding:
    """Stands for decode.generate.Decoding; its rows' tokens are given."""

    def __init__(self, rows):
        self.num_rows, self._left = len(rows), [list(row) for row in rows]
        self._stopped = [False] * len(rows)
        self.num_advances = 0

    @property
    def done(self):
        pairs = zip(self._left, self._stopped, strict=True)
        return np.array([stopped or not left for left, stopped in pairs])

    def stop(self, row):
        self._stopped[row] = True

    def advance(self, num_steps):
        self.num_advances += 1
        new = []
        for row, left in enumerate(self._left):
            number = 0 if self._stopped[row] else min(num_steps, len(left))
            new.append([(token_id, -0.5) for token_id in left[:number]])
            self._left[row] = left[number:]
        return new


def scripted(*rows):
    """A generator whose rows are these texts (str), bytes or ids; None is the end-of-text id."""
    generator = object.__new__(Generator)
    generator.tokenizer = TOKENIZER
    ids = [
        [TOKENIZER.eos_id if i is None else i for i in (r.encode() if isinstance(r, str) else r)]
        for r in rows
    ]

    class Decoder:
        def start(self, prompts, params):
            assert all(prompt[0] == TOKENIZER.eos_id for prompt in prompts)
            self.last = ScriptedDecoding(ids)
            return self.last

    generator._has_encoder = False
    generator._decoder = Decoder()
    return generator


def streamed(generator, params):
    """The pieces, and the whole text of each sample."""
    pieces = list(generator.stream("", params))
    texts = {sample: "" for sample, _, _ in pieces}
    for sample, text, _ in pieces:
        texts[sample] += text
    return pieces, [texts[sample] for sample in sorted(texts)]


@pytest.mark.parametrize(
    "row, stop, text, reason, num_tokens",
    [
        ("hello", (), "hello", "length", 5),
        ([*b"hello", None], (), "hello", "stop", 6),
        ([None], (), "", "stop", 1),
        ("one\n\ntwo", ("\n\n",), "one", "stop", 5),
        ("one\ntwo", ("\n\n",), "one\ntwo", "length", 7),
        ("abcabd!", ("abd", "zzz"), "abc", "stop", 6),
        ("ababc-", ("abc",), "ab", "stop", 5),
        ("abcd", ("bcd", "c"), "ab", "stop", 3),
        ("abcd", ("c", "bc"), "a", "stop", 3),
        ("almost EN", ("END",), "almost EN", "length", 9),
        ([*b"almost EN", None], ("END",), "almost EN", "stop", 10),
        ("END", ("END",), "", "stop", 3),
        ("café au", ("é",), "caf", "stop", 5),
    ],
)
def test_texts_end_where_they_should(row, stop, text, reason, num_tokens):
    params = SamplingParams(stop=stop)
    (completion,) = scripted(row).complete(["p"], params)
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert len(completion.token_ids) == len(completion.logprobs) == num_tokens
    assert completion.num_prompt_tokens == 2
    pieces, texts = streamed(scripted(row), params)
    assert texts == [text]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert all(piece.text for piece in pieces[:-1])


def test_a_stream_waits_with_what_may_become_a_stop_string():
    pieces, _ = streamed(scripted("a.ENx.END!"), SamplingParams(stop=("END",)))
    assert pieces == [
        Piece(0, "a", None), Piece(0, ".", None), Piece(0, "ENx", None), Piece(0, ".", None),
        Piece(0, "", "stop"),
    ]  # fmt: skip


def test_characters_come_whole_though_their_bytes_are_split_over_tokens():
    pieces, texts = streamed(scripted("aé€😀b"), SamplingParams())
    assert [piece.text for piece in pieces] == ["a", "é", "€", "😀", "b"]
    # The bytes of a character that never ends come out at the end, as its replacement.
    for ids in ([*b"a", 0xF0, 0x9F], [*b"a", 0xF0, 0x9F, None]):
        pieces, texts = streamed(scripted(ids), SamplingParams())
        assert texts[0].rstrip("\ufffd") == "a" and "\ufffd" in texts[0]
        assert pieces[0] == Piece(0, "a", None)


def test_a_stop_string_ends_its_row_alone_and_saves_the_rest_of_its_steps():
    generator = scripted("ab#" + "x" * 500, "c" * 40, "d#" + "x" * 500)
    completions = generator.complete(["p"], SamplingParams(n=3, stop=("#",)))
    assert [(c.text, c.finish_reason) for c in completions] == [
        ("ab", "stop"), ("c" * 40, "length"), ("d", "stop"),
    ]  # fmt: skip
    assert generator._decoder.last.num_advances == 3
    _, texts = streamed(scripted("ab#xx", "cccc"), SamplingParams(n=2, stop=("#",)))
    assert texts == ["ab", "cccc"]


def test_what_stop_strings_pass_on_does_not_depend_on_the_pieces():
    text, stop = "aabab-abaabb", ("abaa", "bb", "-a-", "b-abaabb")
    expected = "aabab-"
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(text)), number) for number in (0, 1, 2, 5, 11)
    ):
        stopper, passed = StopStrings(stop), ""
        for start, end in itertools.pairwise((0, *cuts, len(text))):
            passed += stopper.put(text[start:end])
            assert expected.startswith(passed)
            if stopper.found:
                break
        assert passed == expected and stopper.found


@pytest.fixture(scope="module")
def generator():
    # 31 ids more than the tokenizer has.
    config = TransformerConfig(
        vocab_size=288, seq_len=32, num_layers=1, embed_dim=16, num_heads=2, init="gpt2"
    )
    model = Transformer(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32),
        nn.unbox(boxed)["params"],
    )
    return Generator(model, params, TOKENIZER)


def test_from_text_to_text_with_a_model(generator):
    params = SamplingParams(n=2, max_tokens=24, seed=5)
    completions = generator.complete(["", "naïve"], params)
    assert [c.num_prompt_tokens for c in completions] == [1, 1, 7, 7]
    assert len({c.text for c in completions}) == 4
    for completion in completions:
        assert max(completion.token_ids) < TOKENIZER.vocab_size
        assert completion.text == TOKENIZER.decode(completion.token_ids)
        assert -7 < np.mean(completion.logprobs) < -5  # about -log 288
    _, texts = streamed(generator, SamplingParams(n=4, max_tokens=24, seed=5))
    assert texts[:2] == [c.text for c in completions[:2]]
    whole = completions[3].text
    stop = (whole[8:10],)
    stopped = generator.complete(
        ["", "naïve"], SamplingParams(n=2, max_tokens=24, seed=5, stop=stop)
    )
    assert stopped[3].text == whole[: whole.index(stop[0])]
    assert stopped[3].finish_reason == "stop"
    assert len(stopped[3].token_ids) < len(completions[3].token_ids)


def test_a_prompt_longer_than_the_context_is_refused_at_the_call(generator):
    message = "prompt: 40 tokens are not fewer than the model's context of 32"
    with pytest.raises(ValueError, match=message):
        generator.stream("x" * 39, SamplingParams())
    with pytest.raises(ValueError, match=message):
        generator.complete(["a", "x" * 39], SamplingParams())
    assert generator.complete([], SamplingParams()) == []


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    config = TransformerConfig(vocab_size=256, seq_len=32, num_layers=1, embed_dim=8, num_heads=1)
    with pytest.raises(ValueError, match="vocab_size: 257 is not at most the model's 256"):
        Generator(Transformer(config), {}, TOKENIZER)
