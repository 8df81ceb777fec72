"""Prompts into a cache, for the searches that decode a whole text in one compiled program.

P prompts, T tokens of the longest, B rows of the cache, S its length.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.decode import caches
from gpt_jax.models.layers import LayerCache
from gpt_jax.models.transformer import Cache, Transformer, make_cache
from gpt_jax.types import Array, Tree

# The shortest prompt and cache that anything is compiled for.
MIN_BUCKET = 16
# No query has a rank as high: a key that nobody sees.
_UNSEEN = 2**30

Prompts = Sequence[Sequence[int]]


def bucket(size: int, least: int = 1) -> int:
    """The next power of two: few sizes, so few programs to compile."""
    return max(least, 1 << (size - 1).bit_length())


def as_computed(model: Transformer) -> Transformer:
    """The model in the dtype that decodes fastest: on CPU always float32 (see docs/generation.md).

    Raises:
      ValueError: It writes no text.
    """
    if model.config.head != "lm" or model.config.family == "encoder":
        field, needed = ("family", "decoder") if model.config.head == "lm" else ("head", "lm")
        value = getattr(model.config, field)
        raise ValueError(f"model.{field}: {value!r} writes no text; that needs {needed!r}")
    if (model.platform or jax.default_backend()) == "cpu":
        return model.clone(config=dataclasses.replace(model.config, dtype="float32"))
    return model


def check_prompts(prompts: Prompts, *, longest: int, vocab_size: int) -> None:
    """Raises ValueError where a prompt is empty, too long or holds an unknown id."""
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("prompt: 0 tokens are not at least 1")
        if len(prompt) > longest:
            raise ValueError(f"prompt: {len(prompt)} tokens are not at most {longest}, the place")
        unknown = [i for i in prompt if not 0 <= i < vocab_size]
        if unknown:
            raise ValueError(f"prompt: {unknown[0]} is not an id from 0 to {vocab_size - 1}")


def padded(prompts: Prompts, num_rows: int, length: int) -> np.ndarray:
    """int32[num_rows, length] with zeros behind the prompts and in further rows."""
    tokens_BT = np.zeros((num_rows, length), np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)] = prompt
    return tokens_BT


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

    The last token is the input of the first step, so that logits are computed in one place only.

    Args:
      model: The Transformer.
      params: Its parameters.
      prompts: Of at least one token each.
      prompt_B: Which prompt a row continues; each is read once.
      length: S, at least the longest prompt.
      sources: What an encoder_decoder's encoder reads for each prompt.
    """
    num_rows = bucket(len(prompts))
    longest = max(len(prompt) - 1 for prompt in prompts)
    lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    T = min(bucket(longest, MIN_BUCKET), length)
    tokens_PT = padded([prompt[:-1] for prompt in prompts], num_rows, T)
    lengths_P = np.zeros(num_rows, np.int32)
    lengths_P[: len(prompts)] = lengths
    source_PS = source_lengths_P = None
    if sources is not None:
        size = bucket(max(map(len, sources)), MIN_BUCKET)
        source_PS = padded(sources, num_rows, size)
        source_lengths_P = np.zeros(num_rows, np.int32)
        source_lengths_P[: len(sources)] = [len(source) for source in sources]
    return _fill(
        model, params, tokens_PT, lengths_P, source_PS, source_lengths_P, prompt_B, length=length
    )


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _fill(
    model, params, tokens_PT, lengths_P, source_PS, source_lengths_P, prompt_B, *, length: int
) -> Cache:
    P, T = tokens_PT.shape
    inputs = {}
    if model.config.read_prompts_whole:
        inside_PT = jnp.arange(T) < lengths_P[:, None]
        inputs["key_ranks"] = jnp.where(inside_PT, 0, _UNSEEN)
        inputs["query_ranks"] = jnp.zeros((P, T), jnp.int32)
    if source_PS is not None:
        inside_PS = jnp.arange(source_PS.shape[1]) < source_lengths_P[:, None]
        inputs["encoder_tokens"] = source_PS
        inputs["encoder_segment_ids"] = inside_PS.astype(jnp.int32)
        where_PS = jnp.broadcast_to(jnp.arange(source_PS.shape[1]), source_PS.shape)
        inputs["encoder_positions"] = inside_context(model, where_PS)
    empty = make_cache(model.config, P, T, model.config.dtype)
    where_PT = inside_context(model, jnp.broadcast_to(jnp.arange(T), (P, T)))
    cache = model.apply(
        {"params": params}, tokens_PT, where_PT, cache=empty, features=True, **inputs
    )[1]
    memory_length = 0 if source_PS is None else source_PS.shape[1]
    cache = caches.resized(cache, prompt_B, length=length, memory_length=memory_length)
    # What stands behind a prompt's true length is not seen, and overwritten.
    return cache.replace(index_B=lengths_P[prompt_B])


def inside_context(model: Transformer, positions: Array) -> Array:
    """Positions that the model has: padding beyond its context would be read as NaN."""
    return jnp.minimum(positions, model.config.seq_len - 1)


def reordered(cache: Cache, rows_B: Array) -> Cache:
    """The cache whose row b is the old row rows_B[b], but for what an encoder left: rows change
    places within a prompt only."""

    def layer(old: LayerCache) -> LayerCache:
        own = (jnp.take(x, rows_B, axis=x.ndim - 4) for x in (old.k_BKSH, old.v_BKSH))
        return LayerCache(*own, old.memory_k_BKSH, old.memory_v_BKSH)

    layers = jax.tree.map(layer, cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    return cache.replace(layers=layers, index_B=cache.index_B[rows_B])
