"""Causal self-attention by blocks of queries, as XLA:CPU computes it fast.

B batch, T tokens, N query heads, K key/value heads, G = N // K, H head width; S the keys and Q the
queries of a block.

A block of queries meets only the keys up to its own end, so about half of the scores is never
computed. All work is on transposed scores, [S, G Q]:

- A product, the mask, the maximum over keys, the exponential and the rounding to bf16 are one loop
  of XLA:CPU's library, which leaves the weights and nothing else. The mask is added: the library
  has no `where`, and would take back the scores first.
- The gradients of keys and values contract the last dim of what is computed already. The weights
  themselves are kept for them, N T^2 / 2 numbers in each layer; `chunked` is for rows that are too
  long for that.
- The sums of the weights are a row of their product with the values: [values, 1]^T weights.

The weights are not divided by their sums, the outputs are, and the incoming gradient.
docs/speed.md has the figures, and what was tried before.
"""

import functools

import jax
import jax.numpy as jnp

from gpt_jax.ops import products
from gpt_jax.ops.products import Precision
from gpt_jax.ops.scores import MASKED, capped
from gpt_jax.types import Array

# Queries taken at once.
_BLOCK = 128
_MAX_BLOCKS = 8  # each costs compile time
_CHAINS = 3  # blocks that keep two cores busy by themselves


def blocked_causal(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap: float, precision: Precision
) -> Array:
    """softmax(q k^T) v, f32[B, T, N, H], of f32 operands; see ops.attention.attention."""
    arrays = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    B, T = segment_ids_BT.shape
    mesh = jax.sharding.get_abstract_mesh()
    if B % 2 or len(_bounds(T)) >= _CHAINS or mesh.size > 1:
        return _attend(*arrays, window, softcap, precision)
    # Batched products run on one core each: two halves of the rows are two of them at a time.
    halves = zip(*(jnp.split(array, 2) for array in arrays), strict=True)
    return jnp.concatenate([_attend(*half, window, softcap, precision) for half in halves])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap: float, precision: Precision
) -> Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap, precision)[0]


def _bounds(T: int) -> list[tuple[int, int]]:
    """Start and stop of each block."""
    size = max(_BLOCK, -(-T // _MAX_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _heads_first(x_BTNH: Array) -> Array:
    """[B, N, T, H] written out."""
    return products.transposed(x_BTNH, (0, 2, 1, 3), 1)


def _width_first(x_BTNH: Array) -> Array:
    """[B, N, H, T] written out."""
    return products.transposed(x_BTNH, (0, 2, 3, 1), 3)


def _hidden(segment_ids_BT, window, start: int, stop: int) -> Array:
    """f32[B, 1, S, 1, Q]: 0 where the query sees the key."""
    behind = jnp.arange(start, stop) - jnp.arange(stop)[:, None]
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    same = segment_ids_BT[:, :stop, None] == segment_ids_BT[:, None, start:stop]
    return jnp.where(visible & same, 0.0, MASKED)[:, None, :, None]


def _weights(q_BKTH, k_BKTH, hidden, softcap: float, precision: Precision):
    """Weights [B, K, S, G, Q] in `operands`, not divided by their sums; with a softcap the scores,
    too.

    Args:
      q_BKTH: The block's queries, those of a group behind one another, [B, K, G Q, H].
      k_BKTH: Their keys, [B, K, S, H].
      hidden: Of `_hidden`.
      softcap: See ops.attention.attention.
      precision: Of the product.
    """
    scores = products.batched_dot(k_BKTH, q_BKTH, ((3,), (3,)), precision)
    scores = scores.reshape(*scores.shape[:3], -1, hidden.shape[-1])
    scores = capped(scores, softcap)
    masked = scores + hidden
    weights = jnp.exp(masked - masked.max(2, keepdims=True)).astype(precision.operands)
    return weights, scores if softcap else None


def _of_block(x_BNTH: Array, bounds: tuple[int, int], K: int) -> Array:
    """The rows of a block, those of a group behind one another, [B, K, G Q, H]."""
    B, _, _, H = x_BNTH.shape
    return x_BNTH[:, :, slice(*bounds)].reshape(B, K, -1, H)


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap, precision):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q, k, v = (x.astype(precision.operands) for x in (q_BTNH, k_BTKH, v_BTKH))
    q_BNTH, k_BKTH, v_BKHT = _heads_first(q), _heads_first(k), _width_first(v)
    v_BKHT = jnp.concatenate([v_BKHT, jnp.ones_like(v_BKHT[:, :, :1])], axis=2)
    outs, sums, kept = [], [], []
    for start, stop in _bounds(T):
        block = _of_block(q_BNTH, (start, stop), K)
        hidden = _hidden(segment_ids_BT, window, start, stop)
        weights, scores = _weights(block, k_BKTH[:, :, :stop], hidden, softcap, precision)
        flat = weights.reshape(B, K, stop, -1)
        out = products.batched_dot(v_BKHT[..., :stop], flat, ((3,), (2,)), precision)
        out = out.reshape(B, K, H + 1, -1, stop - start).transpose(0, 4, 1, 3, 2)
        outs.append((out[..., :H] / out[..., H:]).reshape(B, -1, N, H))
        sums.append(out[..., H].reshape(B, -1, N))
        kept.append((weights, scores))
    out_BTNH, sum_BTN = jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=1)
    return out_BTNH, (q_BNTH, k, v, kept, sum_BTN, out_BTNH)


def _backward(softcap, precision, residuals, g_BTNH):
    q_BNTH, k_BTKH, v_BTKH, kept, sum_BTN, out_BTNH = residuals
    B, T, K, H = k_BTKH.shape
    dot = functools.partial(products.batched_dot, precision=precision)
    g_BTNH = g_BTNH / sum_BTN[..., None]
    # Of the weights' gradients, weighted by them: what a softmax takes from each.
    mean_BTN = (g_BTNH * out_BTNH).sum(-1)
    g_BNTH = _heads_first(g_BTNH.astype(precision.operands))
    k_BKHT, v_BKTH = _width_first(k_BTKH), _heads_first(v_BTKH)
    dqs, dks, dvs = [], [], []
    for bounds, (weights, scores) in zip(_bounds(T), kept, strict=True):
        start, stop = bounds
        q, g = _of_block(q_BNTH, bounds, K), _of_block(g_BNTH, bounds, K)
        mean = mean_BTN[:, start:stop].reshape(B, stop - start, K, 1, -1).transpose(0, 2, 3, 4, 1)
        grad = dot(v_BKTH[:, :, :stop], g, ((3,), (3,))).reshape(weights.shape)
        dscores = weights.astype(jnp.float32) * (grad - mean)
        if softcap:  # the derivative of tanh
            dscores = dscores * (1 - jnp.square(scores / softcap))
        dscores = dscores.reshape(B, K, stop, -1)
        dks.append(dot(dscores, q, ((3,), (2,))))
        dvs.append(dot(weights.reshape(dscores.shape), g, ((3,), (2,))))
        dq = dot(k_BKHT[..., :stop], dscores, ((3,), (2,)))
        dq = dq.reshape(B, K, H, -1, stop - start).transpose(0, 4, 1, 3, 2)
        dqs.append(dq.reshape(B, stop - start, -1, H))
    dk_BTKH, dv_BTKH = (_summed(x, _bounds(T)).transpose(0, 2, 1, 3) for x in (dks, dvs))
    return jnp.concatenate(dqs, axis=1), dk_BTKH, dv_BTKH, None, None


def _summed(parts: list[Array], bounds: list[tuple[int, int]]) -> Array:
    """The sum of [B, K, stop, H], each zero behind its own stop."""
    sums = [
        sum(part[:, :, start:stop] for part in parts[i:]) for i, (start, stop) in enumerate(bounds)
    ]
    return jnp.concatenate(sums, axis=2)


_attend.defvjp(_forward, _backward)
