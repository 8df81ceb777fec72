"""What all that reads prompts shares: sizes, checks, padding, the model as it computes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.models.quantize import is_bfloat16
from gpt_jax.models.transformer import Transformer
from gpt_jax.types import Array, Tree

# The shortest prompt and cache that anything is compiled for.
MIN_BUCKET = 16

Prompts = Sequence[Sequence[int]]


def bucket(size: int, least: int = 1) -> int:
    """The next power of two: few sizes, so few programs to compile."""
    return max(least, 1 << (size - 1).bit_length())


def as_computed(model: Transformer, params: Tree) -> Transformer:
    """The model in the dtype that decodes fastest.

    On CPU that of its weights: a model that was trained in bfloat16 has them in float32, and would
    cast them again and again. Elsewhere its own.

    Raises:
      ValueError: It writes no text.
    """
    if model.config.head != "lm" or model.config.family == "encoder":
        field, needed = ("family", "decoder") if model.config.head == "lm" else ("head", "lm")
        value = getattr(model.config, field)
        raise ValueError(f"model.{field}: {value!r} writes no text; that needs {needed!r}")
    on_cpu = (model.platform or jax.default_backend()) == "cpu"
    if on_cpu and not is_bfloat16(params):
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


def inside_context(model: Transformer, positions: Array) -> Array:
    """Positions that the model has: padding beyond its context would be read as NaN."""
    return jnp.minimum(positions, model.config.seq_len - 1)
