"""From logits to the next token: temperature, top-k, top-p, min-p, in Hugging Face's order.

B rows, V vocabulary. The rules' values are arrays, one a row, so that changing them compiles
nothing; only what has to be computed at all is static (KINDS).
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.types import Array

# What a batch of rows needs, from the cheapest: the argmax alone; random numbers; also the tokens'
# ranks, for top-k and top-p.
KINDS = ("greedy", "unranked", "ranked")


@flax.struct.dataclass
class Rules:
    """How each row's next token is drawn.

    Attributes:
      temperature_B: f32; divides the logits; 0: the most likely token, whatever else is set.
      top_k_B: int32; only the k most likely tokens and all that tie with the k-th; 0: all.
      top_p_B: f32; only the most likely tokens that together reach this probability
        (arXiv:1904.09751) and what ties with the last of them; 1: all.
      min_p_B: f32; only tokens at least this fraction as likely as the most likely one
        (arXiv:2407.01082); 0: all.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array


def kind_for(rules: Rules) -> str:
    """The cheapest of KINDS that obeys the rules of all rows (concrete arrays)."""
    random = np.asarray(rules.temperature_B) > 0
    ranks = (np.asarray(rules.top_k_B) > 0) | (np.asarray(rules.top_p_B) < 1)
    if not random.any():
        return "greedy"
    return "ranked" if (random & ranks).any() else "unranked"


def forbid_from(logits_BV: Array, vocab_size: int) -> Array:
    """The logits with -inf from column `vocab_size` on: rows that only pad the embedding."""
    if vocab_size >= logits_BV.shape[-1]:
        return logits_BV
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def restrict(logits_BV: Array, rules: Rules, *, kind: str = "ranked") -> Array:
    """Log-probabilities up to a constant a row, f32[B, V], -inf where a rule excludes the token.

    Args:
      logits_BV: Raw logits; -inf excludes a token beforehand.
      rules: Temperature first, then top-k, top-p and min-p, each on what the one before it left.
      kind: "unranked" leaves out top-k and top-p.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # The maximum goes first: no temperature, however small, can then make an infinity minus itself.
    centred_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    temperature_B1 = rules.temperature_B[:, None]
    scaled_BV = centred_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    distance_BV = -scaled_BV  # from the most likely token, in nats
    kept_BV = distance_BV <= -jnp.log(rules.min_p_B)[:, None]
    if kind == "ranked":
        kept_BV &= _in_top(distance_BV, rules)
    return jnp.where(kept_BV, scaled_BV, -jnp.inf)


def _in_top(distance_BV: Array, rules: Rules) -> Array:
    """What top-k and then top-p keep, bool[B, V]."""
    V = distance_BV.shape[-1]
    k_B = jnp.where(rules.top_k_B > 0, jnp.minimum(rules.top_k_B, V), V)
    in_k_BV = _nearest(distance_BV, jnp.ones_like(distance_BV), k_B.astype(jnp.float32))
    probability_BV = jax.nn.softmax(-distance_BV, axis=-1, where=in_k_BV)
    # The sum's rounding must not exclude anything where nothing was asked for.
    top_p_B = jnp.where(rules.top_p_B < 1, rules.top_p_B, jnp.inf)
    return in_k_BV & _nearest(distance_BV, probability_BV, top_p_B)


def _nearest(distance_BV: Array, weight_BV: Array, wanted_B: Array) -> Array:
    """The nearest tokens of each row, ties included, that together reach the wanted weight.

    By bisection over all float32 numbers: 31 passes over the vocabulary find the exact distance,
    where sorting takes several times longer (on CPU 3 ms for 32,000 tokens).
    """
    # As integers the bits of numbers that are not negative are ordered as the numbers are; abs
    # turns -0.0 into 0.0.
    bits_BV = jax.lax.bitcast_convert_type(jnp.abs(distance_BV), jnp.int32)
    infinity = np.float32(np.inf).view(np.int32)

    def halve(_, bounds):
        low_B, high_B = bounds  # too near (or -1), far enough
        middle_B = low_B + (high_B - low_B + 1) // 2
        weight_B = jnp.where(bits_BV <= middle_B[:, None], weight_BV, 0.0).sum(-1)
        enough_B = weight_B >= wanted_B
        return jnp.where(enough_B, low_B, middle_B), jnp.where(enough_B, middle_B, high_B)

    low_B = jnp.full_like(bits_BV[:, 0], -1)
    _, high_B = jax.lax.fori_loop(0, 31, halve, (low_B, jnp.full_like(low_B, infinity)))
    return bits_BV <= high_B[:, None]


# Columns whose largest is found first.
_BLOCK = 64


def most_likely(logits_XV: Array) -> Array:
    """argmax over the last axis, int32[...]: the first of equal ones; nothing may be NaN.

    The largest of each block first, and where it is then: XLA:CPU computes a maximum in vectors,
    but an argmax number by number (for 8 rows of 49,152 in a millisecond).
    """
    *rows, V = logits_XV.shape
    size = -(-V // _BLOCK) * _BLOCK
    padded = jnp.pad(logits_XV, [(0, 0)] * len(rows) + [(0, size - V)], constant_values=-jnp.inf)
    blocks = padded.reshape(*rows, -1, _BLOCK)
    block_X = jnp.argmax(blocks.max(-1), axis=-1)
    inside_XN = jnp.take_along_axis(blocks, block_X[..., None, None], axis=-2)[..., 0, :]
    return (block_X * _BLOCK + jnp.argmax(inside_XN, axis=-1)).astype(jnp.int32)


def draw(logits_BV: Array, keys_B: Array, rules: Rules, *, kind: str = "ranked") -> Array:
    """The next token of each row, int32[B].

    Args:
      logits_BV: Raw logits; -inf excludes a token.
      keys_B: A random key a row: what a row gets does not depend on the other rows.
      rules: How to draw.
      kind: One of KINDS that is enough for `rules` (kind_for).
    """
    greedy_B = most_likely(logits_BV)
    if kind == "greedy":
        return greedy_B
    restricted_BV = restrict(logits_BV, rules, kind=kind)
    random_B = jax.vmap(jax.random.categorical)(keys_B, restricted_BV).astype(jnp.int32)
    return jnp.where(rules.temperature_B > 0, random_B, greedy_B)
