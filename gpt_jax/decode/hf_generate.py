"""`generate` as Hugging Face's: rows of ids in, rows of ids out, by whatever way the options name.

n rows in, each with its num_return_sequences rows out; T ids of the longest of them, N new ones.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.beam import Hypothesis, Rule, beam_search
from gpt_jax.decode.engine import Engine, QueueFull
from gpt_jax.decode.hf_options import GenerateOptions
from gpt_jax.decode.request import Request, Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.speculative import HasModel, speculate
from gpt_jax.decode.text import TextStream
from gpt_jax.ops import penalties
from gpt_jax.tasks.encode import start_id
from gpt_jax.types import Array

Rows = Sequence[Sequence[int]]


class Writer(HasModel, Protocol):
    """What writes: an OpenModel."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]


class Streamer(Protocol):
    """Takes tokens as they come; Hugging Face's streamers are such."""

    def put(self, value: np.ndarray) -> None:
        """int32[1, T], the prompt, and then int32[1] for each token."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


class Generated(NamedTuple):
    """What `generate` wrote.

    Attributes:
      sequences: int32[n * num_return_sequences, T]; prompt (an encoder_decoder's: start token) and
        continuation, filled up on the right with the padding id.
      logprobs: f32, as many rows, [N]: log-probabilities of the new tokens under the model's own
        distribution, nan behind the last one; None of a beam search.
      sequences_scores: f32, one a row: of a beam search the sum of its log-probabilities /
        length^length_penalty; None otherwise.
    """

    sequences: np.ndarray
    logprobs: np.ndarray | None
    sequences_scores: np.ndarray | None


class New(NamedTuple):
    """New tokens of one sample of a row."""

    row: int
    sample: int
    tokens: tuple[Token, ...]


def decode_rows(
    engine: Engine,
    target: Writer,
    rows: Rows,
    params: Sequence[SamplingParams],
    num_steps: int | None = None,
) -> Iterator[New]:
    """New tokens of all rows as they come; a stop string ends a text behind its last token.

    Args:
      engine: Nobody else uses it until the end.
      target: What it runs.
      rows: Prompts.
      params: Rules of each.
      num_steps: Tokens at a time; None: as many as are fastest.

    Raises:
      ValueError: A row is empty, holds an unknown id or leaves no place in the context.
    """
    waiting = list(enumerate(zip(rows, params, strict=True)))[::-1]
    # By the job's id: its row, and what looks for stop strings in each sample that goes on.
    running: dict[int, tuple[int, dict[int, TextStream | None]]] = {}
    while waiting or running:
        while waiting:
            number, (row, one) = waiting[-1]
            try:
                job = engine.submit(Request(tuple(row), one))
            except QueueFull:
                if not running:
                    raise
                break
            running[job.id] = number, {sample: _text(target, one) for sample in range(one.n)}
            waiting.pop()
        for job, output in engine.step(num_steps):
            number, texts = running[job.id]
            if output.sample not in texts:
                continue
            tokens, stopped = _until_stop(texts[output.sample], output.tokens)
            if stopped and output.finish_reason is None:
                engine.end(job, output.sample)
            yield New(number, output.sample, tokens)
            if stopped or output.finish_reason:
                del texts[output.sample]
        running = {key: value for key, value in running.items() if value[1]}


def _until_stop(
    text: TextStream | None, tokens: tuple[Token, ...]
) -> tuple[tuple[Token, ...], bool]:
    """The tokens up to the one that completes a stop string, and whether there was one."""
    if text is None:
        return tokens, False
    for count, token in enumerate(tokens, 1):
        text.put((token,), None)
        if text.finish_reason:
            return tokens[:count], True
    return tokens, False


def generate_rows(
    target: Writer,
    rows: Rows,
    options: GenerateOptions,
    *,
    seed: int,
    draft: HasModel | None = None,
    make_engine: Callable[[int], Engine],
) -> Generated:
    """The continuations of rows.

    Args:
      target: What writes.
      rows: Prompts; what an encoder_decoder's encoder reads.
      options: How.
      seed: Row i is drawn with seed + i, so that equal rows give different texts.
      draft: Proposes tokens that target checks.
      make_engine: An engine for so many texts at once.

    Raises:
      ValueError: A row or an option is not allowed.
    """
    before = counted(target, rows)
    logprobs = scores = None
    if options.num_beams > 1:
        found, scores = _beams(target, rows, before, options)
    else:
        asked = sampling_of(target, before, options, seed)
        drafts = draft is not None or options.prompt_lookup_num_tokens is not None
        if drafts:
            samples = _speculated(target, draft, rows, asked, options)
        else:
            engine = make_engine(sum(one.n for one in asked))
            samples = [[[] for _ in range(one.n)] for one in asked]
            for new in decode_rows(engine, target, rows, asked):
                samples[new.row][new.sample] += new.tokens
        tokens = [sample for row in samples for sample in row]
        found = [[token.id for token in sample] for sample in tokens]
        logprobs = _filled([[token.logprob for token in sample] for sample in tokens], np.nan)
        logprobs = logprobs.astype(np.float32)
    each, ends = options.num_return_sequences, ends_of(target, options)
    pad_id = options.pad_token_id if options.pad_token_id is not None else next(iter(ends), 0)
    whole = [[*before[i // each], *ids] for i, ids in enumerate(found)]
    return Generated(_filled(whole, pad_id).astype(np.int32), logprobs, scores)


def stream_ids(
    target: Writer,
    rows: Rows,
    options: GenerateOptions,
    *,
    seed: int,
    draft: HasModel | None = None,
    make_engine: Callable[[int], Engine],
) -> Iterator[int]:
    """The new ids of the one continuation of one row, as they come.

    Raises:
      ValueError: At the call: there are several, or as generate_rows.
    """
    drafts = draft is not None or options.prompt_lookup_num_tokens is not None
    if len(rows) != 1 or options.num_return_sequences * options.num_beams != 1 or drafts:
        raise ValueError("stream: it is for one continuation of one prompt, without drafts")
    asked = sampling_of(target, counted(target, rows), options, seed)
    news = decode_rows(make_engine(1), target, rows, asked, num_steps=1)
    # The first token is waited for, so that what is refused is told here.
    first = next(news)
    return (token.id for new in itertools.chain([first], news) for token in new.tokens)


def pieces(tokenizer: Tokenizer, ids: Iterator[int], ends: tuple[int, ...]) -> Iterator[str]:
    """Their text, in whole characters, without the id that ends it."""
    streamer = tokenizer.streamer()
    for token_id in ids:
        if token_id not in ends and (piece := streamer.put(token_id)):
            yield piece
    if piece := streamer.flush():
        yield piece


def put_into(streamer: Streamer, before: Sequence[int], ids: Iterator[int]) -> np.ndarray:
    """Gives a streamer the prompt and then each token; int32[1, T], all of them."""
    whole = list(before)
    streamer.put(np.array([whole], np.int32))
    for token_id in ids:
        whole.append(token_id)
        streamer.put(np.array([token_id], np.int32))
    streamer.end()
    return np.array([whole], np.int32)


def counted(target: Writer, rows: Rows) -> Rows:
    """What stands before the new tokens, and max_length counts: the rows, or a decoder's start."""
    config = target.model.config
    if config.family != "encoder_decoder":
        return rows
    return [[start_id(target.tokenizer, config)] for _ in rows]


def ends_of(target: Writer, options: GenerateOptions) -> tuple[int, ...]:
    """Ids that end a text."""
    return target.eos_ids if options.end_ids is None else options.end_ids


def sampling_of(
    target: Writer, before: Rows, options: GenerateOptions, seed: int
) -> list[SamplingParams]:
    """The rules of each row."""
    context = target.model.config.seq_len
    lengths = [options.new_tokens(len(row), context - len(row)) for row in before]
    # Equal prompts are drawn apart; where nothing is drawn, equal rules share one program's run.
    seeds = [(seed + i * options.do_sample) % 2**32 for i in range(len(before))]
    return [options.sampling(*pair, one) for pair, one in zip(lengths, seeds, strict=True)]


def _speculated(target, draft, rows, asked, options: GenerateOptions) -> list[list[list[Token]]]:
    """Tokens of the samples of each row; rows with the same rules go together."""
    num_draft = options.prompt_lookup_num_tokens if draft is None else options.num_assistant_tokens
    found: list[list[list[Token]]] = [[] for _ in rows]
    for params in dict.fromkeys(asked):
        numbers = [i for i, one in enumerate(asked) if one == params]
        answers = speculate(
            target, draft, [rows[i] for i in numbers], params, num_draft,
            eos_ids=target.eos_ids, vocab_size=target.tokenizer.vocab_size,
        )  # fmt: skip
        for i, samples in zip(numbers, answers, strict=True):
            for sample in samples:
                text = _text(target, params)
                found[i].append(list(_until_stop(text, sample.tokens)[0]))
    return found


def _text(target: Writer, params: SamplingParams) -> TextStream | None:
    """What looks for stop strings; None where there are none."""
    if not params.stop:
        return None
    return TextStream(target.tokenizer, params.stop, params.ends(target.eos_ids))


def _filled(rows: Sequence[Sequence[float]], value: float) -> np.ndarray:
    """f64[n, T] with `value` behind the rows."""
    filled = np.full((len(rows), max(map(len, rows), default=0)), value)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def _beams(target: Writer, rows: Rows, before: Rows, options: GenerateOptions):
    """Rows of new ids and their scores f32, best first for each prompt."""
    if options.stop:
        raise ValueError("stop_strings: a beam search ends at ids alone; give eos_token_id")
    ends, context = ends_of(target, options), target.model.config.seq_len
    lengths = [options.new_tokens(len(row), context - len(row)) for row in before]
    # One search for each pair of most new tokens and fewest tokens in all.
    asked = [
        (most, len(row) + fewest if fewest else 0)
        for row, (fewest, most) in zip(before, lengths, strict=True)
    ]
    found: list[list[Hypothesis]] = [[] for _ in rows]
    for most, until in dict.fromkeys(asked):
        numbers = [i for i, one in enumerate(asked) if one == (most, until)]
        answers = beam_search(
            target.model, target.params, [rows[i] for i in numbers],
            num_beams=options.num_beams, max_new_tokens=most, eos_ids=ends,
            length_penalty=options.length_penalty, early_stopping=options.early_stopping,
            num_return_sequences=options.num_return_sequences,
            vocab_size=target.tokenizer.vocab_size,
            rule=_rule(options.repetition_penalty, options.no_repeat_ngram_size, ends, until),
        )  # fmt: skip
        for i, best in zip(numbers, answers, strict=True):
            found[i] = best
    flat = [hypothesis for best in found for hypothesis in best]
    scores = np.array([hypothesis.score for hypothesis in flat], np.float32)
    return [hypothesis.ids for hypothesis in flat], scores


@functools.cache
def _rule(repetition: float, ngram: int, ends: tuple[int, ...], until: int) -> Rule | None:
    """What changes a beam search's log-probabilities; one object for one set of values, which is
    compiled once."""
    if repetition == 1.0 and not ngram and not until:
        return None

    def rule(logprob_RV: Array, text_RS: Array, length_R: Array) -> Array:
        R, S = text_RS.shape
        if repetition != 1.0:
            inside_RS = jnp.arange(S) < length_R[:, None]
            seen_RV = jnp.zeros(logprob_RV.shape, bool)
            seen_RV = seen_RV.at[jnp.arange(R)[:, None], text_RS].max(inside_RS)
            logprob_RV = penalties.penalize_seen(logprob_RV, seen_RV, repetition)
        if ngram:
            ngram_R = jnp.full(R, ngram, jnp.int32)
            logprob_RV = penalties.forbid_ngrams(logprob_RV, text_RS, length_R, ngram_R)
        if until and ends:
            logprob_RV = penalties.forbid(logprob_RV, jnp.array(ends), length_R < until)
        return logprob_RV

    return rule
