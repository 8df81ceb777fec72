"""From logits to the next token: temperature, top-k, top-p, min-p, in Hugging Face's order.

B rows, V vocabulary. The rules' values are arrays, one a row, so that changing them compiles
nothing; only what has to be computed at all is static (KINDS).
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.types import Array

# What a batch of rows needs, from the cheapest: the argmax alone; random numbers; also a sort.
KINDS = ("greedy", "unsorted", "sorted")


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
    sorts = (np.asarray(rules.top_k_B) > 0) | (np.asarray(rules.top_p_B) < 1)
    if not random.any():
        return "greedy"
    return "sorted" if (random & sorts).any() else "unsorted"


def forbid_from(logits_BV: Array, vocab_size: int) -> Array:
    """The logits with -inf from column `vocab_size` on: rows that only pad the embedding."""
    if vocab_size >= logits_BV.shape[-1]:
        return logits_BV
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def restrict(logits_BV: Array, rules: Rules, *, kind: str = "sorted") -> Array:
    """Log-probabilities up to a constant a row, f32[B, V], -inf where a rule excludes the token.

    Args:
      logits_BV: Raw logits; -inf excludes a token beforehand.
      rules: Temperature first, then top-k, top-p and min-p, each on what the one before it left.
      kind: "unsorted" leaves out top-k and top-p.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # The maximum goes first: no temperature, however small, can then make an infinity minus itself.
    centred_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    temperature_B1 = rules.temperature_B[:, None]
    scaled_BV = centred_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    lowest_B1 = jnp.log(rules.min_p_B)[:, None]  # the most likely token stands at 0
    if kind == "sorted":
        lowest_B1 = jnp.maximum(lowest_B1, _lowest_by_rank(scaled_BV, rules))
    return jnp.where(scaled_BV >= lowest_B1, scaled_BV, -jnp.inf)


def _lowest_by_rank(scaled_BV: Array, rules: Rules) -> Array:
    """The smallest value of each row that top-k and then top-p keep, [B, 1]."""
    V = scaled_BV.shape[-1]
    # Both rules come down to a smallest value: the values alone are sorted, and nothing has to be
    # brought back into the vocabulary's order.
    sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
    k_B = jnp.where(rules.top_k_B > 0, jnp.minimum(rules.top_k_B, V), V)
    kth_B1 = jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=-1)
    in_k_BV = sorted_BV >= kth_B1
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1, where=in_k_BV)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # The sum's rounding must not exclude anything where nothing was asked for.
    top_p_B1 = jnp.where(rules.top_p_B < 1, rules.top_p_B, jnp.inf)[:, None]
    kept_BV = in_k_BV & (before_BV < top_p_B1)
    return jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)


def draw(logits_BV: Array, keys_B: Array, rules: Rules, *, kind: str = "sorted") -> Array:
    """The next token of each row, int32[B].

    Args:
      logits_BV: Raw logits; -inf excludes a token.
      keys_B: A random key a row: what a row gets does not depend on the other rows.
      rules: How to draw.
      kind: One of KINDS that is enough for `rules` (kind_for).
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if kind == "greedy":
        return greedy_B
    restricted_BV = restrict(logits_BV, rules, kind=kind)
    random_B = jax.vmap(jax.random.categorical)(keys_B, restricted_BV).astype(jnp.int32)
    return jnp.where(rules.temperature_B > 0, random_B, greedy_B)
