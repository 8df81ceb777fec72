"""Prompts into a cache: several short ones together, a long one by chunks.

G prompts of a group, T tokens of a chunk, S cache length, V vocabulary, k most likely tokens, B
rows of a search's cache.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.decode import caches
from gpt_jax.decode.loop import top_of
from gpt_jax.decode.prompts import MIN_BUCKET, Prompts, bucket, inside_context, padded
from gpt_jax.decode.request import Token
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.ops import penalties
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Tree

# No query has a rank as high: a key that nobody sees.
_UNSEEN = 2**30


class Scores(NamedTuple):
    """What the model said of the tokens that follow those of a chunk.

    Attributes:
      logprobs_GT: f32; of the tokens that stand there.
      top_ids_GTk, top_logprobs_GTk: Of the most likely ones.
    """

    logprobs_GT: Array
    top_ids_GTk: Array
    top_logprobs_GTk: Array


class Prefill:
    """Prompts being read into a cache of their own.

    Attributes:
      cache: One row a prompt, and more to fill it up to a power of two.
      done: Whether all is read.
      scores: Of each prompt the Tokens of its second and later tokens, if they were asked for.
    """

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        texts: Sequence[Sequence[int]],
        *,
        chunk: int,
        vocab_size: int,
        sources: Sequence[Sequence[int]] | None = None,
        known: Cache | None = None,
        num_known: int = 0,
        top: int | None = None,
    ):
        """
        Args:
          model: The Transformer.
          params: Its parameters.
          texts: Ids; all but the last of each are read. Several must fit one chunk.
          chunk: Most tokens of one call of `advance`, padding included.
          vocab_size: Ids from here on are never reported.
          sources: What an encoder reads for each text.
          known: A cache of one row that holds the first num_known tokens of the only text.
          num_known: How many.
          top: One of loop.TOP_SIZES: tokens are scored; None: they are not.
        """
        self._model, self._params, self._texts = model, params, texts
        self._sources, self._top, self._vocab_size = sources, top, vocab_size
        self._chunk = chunk
        self._start = num_known
        self._num = max(len(text) - 1 for text in texts)
        self.scores: list[list[Token]] = [[] for _ in texts]
        memory = 0
        if sources is not None:
            memory = min(bucket(max(map(len, sources)), MIN_BUCKET), model.config.seq_len)
            self._num = max(self._num, 1)  # the encoder is read in the first pass
        self._memory_length = memory
        # A chunk's padding is written too, and must not run out of the cache.
        length = bucket(num_known + self._padded(self._num - num_known), MIN_BUCKET)
        if known is not None:
            self.cache = caches.resized(known, np.zeros(1, np.int32), length=length)
        else:
            self.cache = caches.empty(model, bucket(len(texts)), length, memory)

    @property
    def done(self) -> bool:
        return self._start >= self._num

    def advance(self) -> None:
        """Reads one chunk."""
        start, size = self._start, min(self._num - self._start, self._chunk)
        G, T = bucket(len(self._texts)), min(bucket(size, MIN_BUCKET), self._chunk)
        parts = [text[:-1][start : start + T] for text in self._texts]
        lengths_G = np.zeros(G, np.int32)
        lengths_G[: len(parts)] = [len(part) for part in parts]
        sources = ()
        if self._sources is not None:
            source_lengths_G = np.zeros(G, np.int32)
            source_lengths_G[: len(parts)] = [len(source) for source in self._sources]
            sources = padded(self._sources, G, self._memory_length), source_lengths_G
        arguments = (
            self._model, self._params, self.cache, padded(parts, G, T), lengths_G,
            np.full(G, start, np.int32),
        )  # fmt: skip
        if self._top is None:
            self.cache = _read(*arguments, *sources)
        else:
            next_GT = padded([text[1:][start : start + T] for text in self._texts], G, T)
            self.cache, scores = _score(
                *arguments, next_GT, top=self._top, vocab_size=self._vocab_size
            )
            self._note(next_GT, lengths_G, sharding.fetch(scores))
        self._start += T

    def _padded(self, size: int) -> int:
        """Places that are written for `size` tokens."""
        whole, rest = divmod(size, self._chunk)
        return whole * self._chunk + (min(bucket(rest, MIN_BUCKET), self._chunk) if rest else 0)

    def _note(self, next_GT, lengths_G, scores: Scores) -> None:
        for g, tokens in enumerate(self.scores):
            for t in range(lengths_G[g]):
                ids, logprobs = scores.top_ids_GTk[g, t], scores.top_logprobs_GTk[g, t]
                top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
                tokens.append(Token(int(next_GT[g, t]), float(scores.logprobs_GT[g, t]), top))


def fill(
    model: Transformer,
    params: Tree,
    prompts: Prompts,
    prompt_B: np.ndarray,
    *,
    length: int,
    sources: Prompts | None = None,
) -> Cache:
    """A cache whose row b holds all but the last token of prompt prompt_B[b].

    For the searches that decode a whole text in one compiled program; its index is kept.

    Args:
      model: The Transformer.
      params: Its parameters.
      prompts: Of at least one token each.
      prompt_B: Which prompt a row continues; each is read once.
      length: S, at least the longest prompt.
      sources: What an encoder_decoder's encoder reads for each prompt.
    """
    lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    prefill = Prefill(
        model, params, prompts, chunk=bucket(int(lengths.max()), MIN_BUCKET),
        vocab_size=model.config.vocab_size, sources=sources,
    )  # fmt: skip
    while not prefill.done:
        prefill.advance()
    segments = prefill.cache.memory_segments_BS
    memory_length = 0 if segments is None else segments.shape[1]
    cache = caches.resized(
        prefill.cache, prompt_B, length=length, memory_length=memory_length
    )  # fmt: skip
    # What stands behind a prompt's true length is not seen, and overwritten.
    return cache.replace(index_B=lengths[prompt_B])


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def _read(
    model: Transformer, params: Tree, cache: Cache, tokens_GT: Array, lengths_G: Array,
    start_G: Array, source_GS: Array | None = None, source_lengths_G: Array | None = None,
) -> Cache:  # fmt: skip
    """The cache with a chunk more."""
    how = _inputs(model, tokens_GT, lengths_G, start_G, source_GS, source_lengths_G)
    cache = cache.replace(index_B=start_G)
    return caches.laid(
        model.apply({"params": params}, tokens_GT, cache=cache, features=True, **how)[1]
    )


@functools.partial(
    jax.jit, static_argnames=("model", "top", "vocab_size"), donate_argnames=("cache",)
)
def _score(
    model: Transformer, params: Tree, cache: Cache, tokens_GT: Array, lengths_G: Array,
    start_G: Array, next_GT: Array, *, top: int, vocab_size: int,
) -> tuple[Cache, Scores]:  # fmt: skip
    """The cache with a chunk more, and the scores of what follows each token."""
    G, T = tokens_GT.shape
    how = _inputs(model, tokens_GT, lengths_G, start_G, None, None)
    cache = cache.replace(index_B=start_G)
    logits_GTV, cache = model.apply({"params": params}, tokens_GT, cache=cache, **how)
    logits_RV = logits_GTV.reshape(G * T, -1)
    logprobs_R1 = penalties.logprobs_of(logits_RV, next_GT.reshape(-1, 1))
    ids_Rk, top_Rk = top_of(logits_RV, top, vocab_size)
    scores = Scores(
        logprobs_R1.reshape(G, T), ids_Rk.reshape(G, T, -1), top_Rk.reshape(G, T, -1)
    )  # fmt: skip
    return caches.laid(cache), scores


def _inputs(model, tokens_GT, lengths_G, start_G, source_GS, source_lengths_G) -> dict:
    config, T = model.config, tokens_GT.shape[1]
    places_GT = start_G[:, None] + jnp.arange(T)
    inputs = {"positions_BT": inside_context(model, places_GT)}
    if config.read_prompts_whole:
        inside_GT = jnp.arange(T) < lengths_G[:, None]
        inputs["key_ranks"] = jnp.where(inside_GT, 0, _UNSEEN)
        inputs["query_ranks"] = jnp.zeros(tokens_GT.shape, jnp.int32)
    if source_GS is not None:
        inside_GS = jnp.arange(source_GS.shape[1]) < source_lengths_G[:, None]
        inputs["encoder_tokens"] = source_GS
        inputs["encoder_segment_ids"] = inside_GS.astype(jnp.int32)
    return inputs
