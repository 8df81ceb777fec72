"""Attention: one signature, a table of implementations.

B batch, T queries, S keys, N query heads, K key/value heads, G = N // K, H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt_jax.ops import products
from gpt_jax.ops.blocked_attention import blocked_causal
from gpt_jax.ops.chunked_attention import chunked, devices_of_a_row
from gpt_jax.ops.key_pages import KeyPages
from gpt_jax.ops.products import Precision
from gpt_jax.ops.scores import attend, heads_first
from gpt_jax.types import Array

_LEAST = 16  # queries for which a rule of their gradients is worth while


def _scores_mask(causal, segment_ids_BT, window, num_queries: int, num_keys: int):
    """Boolean [B or 1, 1, 1, T, S], True = attend; None if all is visible."""
    masks = []
    if causal:
        behind = jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :]
        masks.append(behind >= 0 if window is None else (behind >= 0) & (behind < window))
    if segment_ids_BT is not None:
        same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        masks.append(same[:, None, None])
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _einsum(
    q_BTNH, k_BSKH, v_BSKH, *, causal, segment_ids_BT, window, mask_BTS, bias_BNTS, softcap,
    precision,
):  # fmt: skip
    """All scores at once."""
    B, T, N, H = q_BTNH.shape
    q, k, v = (heads_first(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    q = q.reshape(B, k.shape[1], -1, T, H)
    if mask_BTS is not None:
        mask = mask_BTS[:, None, None]
    else:
        mask = _scores_mask(causal, segment_ids_BT, window, q.shape[3], k.shape[2])
    out = attend(q, k, v, mask, bias_BNTS, softcap, precision)
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def _blocked(
    q_BTNH, k_BSKH, v_BSKH, *, causal, segment_ids_BT, window, mask_BTS, bias_BNTS, softcap,
    precision,
):  # fmt: skip
    """Causal self-attention by blocks, so that about half of the scores is never computed."""
    B, T = q_BTNH.shape[:2]
    if not causal or mask_BTS is not None or bias_BNTS is not None or T < _LEAST:
        return _einsum(
            q_BTNH, k_BSKH, v_BSKH, causal=causal, segment_ids_BT=segment_ids_BT, window=window,
            mask_BTS=mask_BTS, bias_BNTS=bias_BNTS, softcap=softcap, precision=precision,
        )  # fmt: skip
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    return blocked_causal(q, k, v, segment_ids_BT, window, softcap, precision)


def _library(
    q_BTNH, k_BSKH, v_BSKH, *, causal, segment_ids_BT, window, mask_BTS, bias_BNTS, softcap,
    precision, name,
):  # fmt: skip
    """jax.nn.dot_product_attention; with name "cudnn" the flash kernel of NVIDIA GPUs."""
    if softcap:  # which it does not know
        return _einsum(
            q_BTNH, k_BSKH, v_BSKH, causal=causal, segment_ids_BT=segment_ids_BT, window=window,
            mask_BTS=mask_BTS, bias_BNTS=bias_BNTS, softcap=softcap, precision=precision,
        )  # fmt: skip
    if mask_BTS is not None:
        mask = mask_BTS[:, None]
    else:
        # Its own window must be known when the program is compiled.
        own = causal and window is not None
        mask = _scores_mask(own, segment_ids_BT, window, q_BTNH.shape[1], k_BSKH.shape[1])
        mask = None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:])
    q, k, v = (x.astype(precision.operands) for x in (q_BTNH, k_BSKH, v_BSKH))
    # f32 operands mean f32, as in products.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q, k, v, bias_BNTS, mask, is_causal=causal, scale=1.0, implementation=name
        )


_IMPLEMENTATIONS = {
    "einsum": _einsum,
    "blocked": _blocked,
    "xla": functools.partial(_library, name="xla"),
    "cudnn": functools.partial(_library, name="cudnn"),
    "chunked": chunked,
}
IMPLEMENTATIONS = ("auto", *_IMPLEMENTATIONS)


def implementation_for(name: str, platform: str) -> str:
    """What "auto" means on a platform of JAX and on the mesh in use; other names stand for
    themselves."""
    if name != "auto":
        return name
    if devices_of_a_row() > 1:
        return "chunked"
    return {"cpu": "blocked"}.get(platform, "xla")


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    precision: Precision,
    causal: bool = True,
    segment_ids_BT: Array | None = None,
    mask_BTS: Array | None = None,
    bias_BNTS: Array | None = None,
    window: Array | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    implementation: str = "einsum",
) -> Array:
    """softmax(scale * q k^T + bias) v (arXiv:1706.03762), [B, T, N, H] in `precision.output`.

    Args:
      q_BTNH: Queries. N must be a multiple of K: each key/value head serves N // K query heads
        (arXiv:2305.13245).
      k_BSKH: Keys.
      v_BSKH: Values.
      precision: Dtypes of the two products; the softmax is always f32.
      causal: Query t sees keys 0..t; needs S == T.
      segment_ids_BT: Queries see keys of their own segment only; needs S == T.
      mask_BTS: True = attend; replaces the two above (decoding with a cache, ranks, cross
        attention). A query that may see nothing gets the mean of all values.
      bias_BNTS: f32, added to the scores; B may be 1 (arXiv:1910.10683).
      window: int32[]; with `causal`, query t sees no key before t - window + 1.
      softcap: c in c * tanh(score / c), before the bias (arXiv:2408.00118); 0: none.
      scale: Factor of the scores; None: 1 / sqrt(H).
      implementation: A name of IMPLEMENTATIONS but "auto".
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    q_BTNH = _scaled(q_BTNH, scale)
    out = _IMPLEMENTATIONS[implementation](
        q_BTNH, k_BSKH, v_BSKH, causal=causal and mask_BTS is None,
        segment_ids_BT=segment_ids_BT, window=window, mask_BTS=mask_BTS, bias_BNTS=bias_BNTS,
        softcap=softcap, precision=precision,
    )  # fmt: skip
    return products.to_compute(out, precision)


def _scaled(q_BTNH: Array, scale: float | None) -> Array:
    """Scaling q is cheaper than scaling the scores: H numbers a query instead of S."""
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    return q_BTNH if scale == 1 else q_BTNH * scale


def attend_cached(
    q_BTNH: Array,
    k_BKSH: Array | KeyPages,
    v_BKSH: Array,
    mask_BTS: Array,
    *,
    precision: Precision,
    bias_BNTS: Array | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Array:
    """`attention` to keys and values that lie heads first, as a cache holds them.

    A decoded token reads all of them once. In this order each head's are contiguous, and the two
    products read them where they lie; in the order of `attention` they are copied first, which
    took three to six times as long on CPU (docs/speed.md).
    """
    B, T, N, H = q_BTNH.shape
    K = v_BKSH.shape[1]
    assert N % K == 0, (q_BTNH.shape, v_BKSH.shape)
    q_BKGTH = heads_first(_scaled(q_BTNH, scale)).reshape(B, K, N // K, T, H)
    mask = mask_BTS[:, None, None]
    precision = dataclasses.replace(precision, operands=precision.cache)
    out_BKGTH = attend(q_BKGTH, k_BKSH, v_BKSH, mask, bias_BNTS, softcap, precision)
    out_BTNH = out_BKGTH.reshape(B, N, T, H).transpose(0, 2, 1, 3)
    return products.to_compute(out_BTNH, precision)
