"""Softmax attention to given keys, whatever chose them: what the implementations share.

B batch, T queries, S keys, N query heads, K key/value heads, G = N // K, H head width.
"""

import jax
import jax.numpy as jnp

from gpt_jax.ops import key_pages, products
from gpt_jax.ops.key_pages import KeyPages
from gpt_jax.ops.products import Precision
from gpt_jax.types import Array

# Finite, so that a row without any visible key gives a uniform softmax instead of NaN.
MASKED = -1e30


def capped(scores: Array, softcap: float) -> Array:
    """softcap * tanh(scores / softcap); with 0 the scores themselves."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def attend(q_BKGTH, k_BKSH, v_BKSH, mask, bias_BNTS, softcap, precision: Precision) -> Array:
    """Softmax attention with heads in front of length, f32[B, K, G, T, H]; the softmax in f32.

    Args:
      q_BKGTH, k_BKSH, v_BKSH: Queries (scaled), keys (or KeyPages) and values.
      mask: Boolean, broadcast to [B, K, G, T, S], True = attend; None: all is visible.
      bias_BNTS: f32, added to the scores; B may be 1; None: none.
      softcap: See ops.attention.attention.
      precision: Dtypes of the products.
    """
    B, K, G, T, H = q_BKGTH.shape
    # The G queries of a key head stand behind one another: one product for each (B, K).
    q = q_BKGTH.reshape(B, K, G * T, H)
    if isinstance(k_BKSH, KeyPages):
        scores = key_pages.scores(q, k_BKSH, v_BKSH.shape[2], precision)
    else:
        scores = products.batched_dot(q, k_BKSH, ((3,), (3,)), precision)
    scores = capped(scores.reshape(B, K, G, T, -1), softcap)
    if bias_BNTS is not None:
        scores = scores + bias_BNTS.reshape(bias_BNTS.shape[0], K, G, *bias_BNTS.shape[2:])
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, G * T, -1)
    out = products.batched_dot(weights, v_BKSH, ((3,), (2,)), precision)
    return out.reshape(B, K, G, T, H)


def heads_first(x_BTNH: Array) -> Array:
    """[B, N, T, H]."""
    return x_BTNH.transpose(0, 2, 1, 3)
