"""Text out of tokens: stop strings, whole characters, finish reasons, streams."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.engine import Job
from gpt_jax.decode.request import Output, Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.stopping import StopStrings
from gpt_jax.decode.text import Generator, Piece, TextStream
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer

TOKENIZER = byte_tokenizer()


class ScriptedEngine:
    """Stands for decode.engine.Engine; the tokens of each sample are given."""

    def __init__(self, rows):
        self._rows = rows
        self._left: dict = {}
        self.num_steps = 0

    def check(self, request):
        assert request.prompt[0] == TOKENIZER.eos_id

    def submit(self, request):
        self._left = {sample: list(row) for sample, row in enumerate(self._rows)}
        self._job = Job(1, request)
        return self._job

    def end(self, job, sample):
        del self._left[sample]

    def cancel(self, job):
        self._left.clear()

    def step(self, num_steps):
        self.num_steps += 1
        outputs = []
        for sample, left in list(self._left.items()):
            new = tuple(Token(i, -0.5) for i in left[: num_steps or 16])
            self._left[sample] = left[len(new) :]
            reason = None
            if not self._left[sample]:
                reason = "stop" if new and new[-1].id == TOKENIZER.eos_id else "length"
                del self._left[sample]
            outputs.append((self._job, Output(sample, new, reason)))
        return outputs


def scripted(*rows):
    """A generator whose rows are these texts (str), bytes or ids; None is the end-of-text id."""
    generator = object.__new__(Generator)
    generator.tokenizer = TOKENIZER
    generator._eos_ids = generator._prefix = (TOKENIZER.eos_id,)
    generator._suffix, generator._readings = (), {}
    generator._engine = ScriptedEngine([
        [TOKENIZER.eos_id if i is None else i for i in (r.encode() if isinstance(r, str) else r)]
        for r in rows
    ])  # fmt: skip
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
    assert len(completion.tokens) == num_tokens
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
    assert generator._engine.num_steps == 3
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
        ids = [token.id for token in completion.tokens]
        assert max(ids) < TOKENIZER.vocab_size
        assert completion.text == TOKENIZER.decode(ids)
        assert -7 < completion.mean_logprob < -5  # about -log 288
    _, texts = streamed(generator, SamplingParams(n=4, max_tokens=24, seed=5))
    assert texts[:2] == [c.text for c in completions[:2]]
    whole = completions[3].text
    stop = (whole[8:10],)
    stopped = generator.complete(
        ["", "naïve"], SamplingParams(n=2, max_tokens=24, seed=5, stop=stop)
    )
    assert stopped[3].text == whole[: whole.index(stop[0])]
    assert stopped[3].finish_reason == "stop"
    assert len(stopped[3].tokens) < len(completions[3].tokens)


def test_streams_side_by_side_give_what_each_gives_alone(generator):
    params = SamplingParams(n=2, max_tokens=12, seed=3)
    alone = [[list(generator.stream(prompt, params))][0] for prompt in ("a", "bc")]
    first, second = generator.stream("a", params), generator.stream("bc", params)
    pieces = ([], [])
    for one, other in itertools.zip_longest(first, second):
        pieces[0].append(one)
        pieces[1].append(other)
    assert [[p for p in own if p] for own in pieces] == alone
    # One that is left in the middle frees its places.
    half = generator.stream("a", params)
    next(half)
    assert not generator._engine.idle
    half.close()
    assert generator._engine.idle and not generator._readings


def test_best_of_gives_the_likeliest_by_the_mean_of_a_token(generator):
    params = SamplingParams(n=4, max_tokens=6, seed=2, temperature=2.0)
    every = sorted(generator.complete(["ab"], params), key=lambda c: -c.mean_logprob)
    assert every[0].mean_logprob > every[1].mean_logprob > every[2].mean_logprob
    two = generator.complete(["ab"], dataclasses.replace(params, n=2), best_of=4)
    assert two == every[:2]
    with pytest.raises(ValueError, match="best_of: 1 is not at least n 4"):
        generator.complete(["ab"], params, best_of=1)


def test_ids_are_read_as_they_are(generator):
    params = SamplingParams(max_tokens=6, temperature=0.0)
    (text,) = generator.complete(["ab"], params)
    assert generator.complete([[TOKENIZER.eos_id, 97, 98]], params) == [text]
    (bare,) = generator.complete([[97, 98]], params)
    assert bare.num_prompt_tokens == 2


def test_stop_ids_are_no_part_of_the_text():
    stream = TextStream(TOKENIZER, (), (98,))
    assert stream.put([Token(97, 0.0), Token(98, 0.0), Token(99, 0.0)]) == "a"
    assert stream.finish_reason == "stop" and [t.id for t in stream.tokens] == [97, 98]
    # The engine knows more ids that end a text than are told here.
    stream = TextStream(TOKENIZER)
    assert stream.put([Token(97, 0.0), Token(98, 0.0)], "stop") == "a"


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
