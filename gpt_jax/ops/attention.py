"""Attention: one signature, a table of implementations.

B batch, T queries, S keys, N query heads, K key/value heads, G = N // K, H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt_jax.ops import products
from gpt_jax.ops.chunked_attention import chunked, devices_of_a_row
from gpt_jax.ops.key_pages import KeyPages
from gpt_jax.ops.products import Precision
from gpt_jax.ops.scores import MASKED, attend, capped, heads_first
from gpt_jax.types import Array

# Queries taken at once on CPU: a block of queries meets only the keys up to its own end, so about
# half of the scores is never computed.
_BLOCK = 128
_MAX_BLOCKS = 8
_LEAST = 16  # queries for which the gradients' own rule is worth while


def _scores_mask(causal, segment_ids_BT, window, start: int, stop: int, num_keys: int):
    """Boolean [B or 1, 1, 1, stop - start, num_keys], True = attend; None if all is visible."""
    masks = []
    if causal:
        behind = jnp.arange(start, stop)[:, None] - jnp.arange(num_keys)[None, :]
        masks.append(behind >= 0 if window is None else (behind >= 0) & (behind < window))
    if segment_ids_BT is not None:
        queries, keys = segment_ids_BT[:, start:stop], segment_ids_BT[:, :num_keys]
        masks.append((queries[:, :, None] == keys[:, None, :])[:, None, None])
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
        mask = _scores_mask(causal, segment_ids_BT, window, 0, q.shape[3], k.shape[2])
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
    assert q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype, "the backward pass gives one dtype"
    return _blocked_causal(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window, softcap, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked_causal(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap: float, precision: Precision
):
    """The backward pass works on transposed scores, [keys, queries].

    Then the gradients of keys and values contract the last dim of what is computed already, and
    only dq needs a transpose, of its narrow operand: XLA:CPU would compute p^T do in f32 and
    transpose p. A block has all of the keys of its queries, so that dq is whole in it and its
    narrow result is transposed block by block: a sum over blocks, transposed as one, was read with
    strides of a row's length, and took a fifth of a step of GPT-2's (docs/speed.md).
    """
    return _blocked_fwd(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap, precision)[0]


def _block_bounds(T: int) -> list[tuple[int, int]]:
    """At most _MAX_BLOCKS blocks: each costs compile time."""
    size = max(_BLOCK, -(-T // _MAX_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _transposed(x: Array, axes: tuple[int, ...]) -> Array:
    """x[B, T, ...] written out, in parts that are no block's queries and not all of its keys."""
    stop = _block_bounds(x.shape[1])[0][1]
    return products.transposed(x, axes, 1, at=stop // 2)


def _blocked_fwd(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, softcap, precision):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G = N // K
    split = q_BTNH.astype(precision.operands).reshape(B, T, K, G, H)
    q_BKGTH = _transposed(split, (0, 2, 3, 1, 4))
    keys, values = (x.astype(precision.operands) for x in (k_BTKH, v_BTKH))
    k_BKTH, v_BKTH = (_transposed(x, (0, 2, 1, 3)) for x in (keys, values))
    outs, logs = [], []
    for start, stop in _block_bounds(T):
        q = q_BKGTH[:, :, :, start:stop].reshape(B, K, -1, H)
        scores = products.batched_dot(q, k_BKTH[:, :, :stop], ((3,), (3,)), precision)
        scores = capped(scores.reshape(B, K, G, stop - start, stop), softcap)
        mask = _scores_mask(True, segment_ids_BT, window, start, stop, stop)
        scores = jnp.where(mask, scores, MASKED)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = products.batched_dot(
            weights.reshape(B, K, -1, stop), v_BKTH[:, :, :stop], ((3,), (2,)), precision
        )
        # Dividing the outputs is cheaper than dividing the weights.
        outs.append(out.reshape(B, K, G, stop - start, H) / total)
        logs.append((top + jnp.log(total))[..., 0])
    out_BKGTH = jnp.concatenate(outs, axis=3)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    lse_BKGT = jnp.concatenate(logs, axis=3)
    kept = (k_BTKH, segment_ids_BT, window, q_BKGTH, k_BKTH, v_BKTH, out_BTNH, lse_BKGT)
    return out_BTNH, kept


def _blocked_bwd(softcap, precision, residuals, g_BTNH):
    k_BTKH, segments, window, q_BKGTH, k_BKTH, v_BKTH, out_BTNH, lse_BKGT = residuals
    B, K, G, T, H = q_BKGTH.shape
    dot = functools.partial(products.batched_dot, precision=precision)
    delta_BKGT = (g_BTNH * out_BTNH).sum(-1).reshape(B, T, K, G).transpose(0, 2, 3, 1)
    split = g_BTNH.astype(precision.operands).reshape(B, T, K, G, H)
    g_BKGTH = _transposed(split, (0, 2, 3, 1, 4))
    k_BKHT = _transposed(k_BTKH.astype(precision.operands), (0, 2, 3, 1))
    dqs, dks, dvs = [], [], []
    bounds = _block_bounds(T)
    for start, stop in bounds:
        # The queries of one block and all keys that they may see.
        size = stop - start
        q, g = (x[:, :, :, start:stop].reshape(B, K, -1, H) for x in (q_BKGTH, g_BKGTH))
        lse, delta = (x[:, :, None, :, start:stop] for x in (lse_BKGT, delta_BKGT))
        behind = jnp.arange(start, stop) - jnp.arange(stop)[:, None]
        visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        same = segments[:, :stop, None] == segments[:, None, start:stop]
        mask = (visible & same)[:, None, :, None]
        scores = dot(k_BKTH[:, :, :stop], q, ((3,), (3,))).reshape(B, K, stop, G, size)
        scores = capped(scores, softcap)
        weights = jnp.where(mask, jnp.exp(scores - lse), 0.0)
        grad = dot(v_BKTH[:, :, :stop], g, ((3,), (3,))).reshape(scores.shape)
        dscores = weights * (grad - delta)
        if softcap:  # the derivative of tanh
            dscores = dscores * (1 - jnp.square(scores / softcap))
        dscores = dscores.reshape(B, K, stop, -1)
        dks.append(dot(dscores, q, ((3,), (2,))))
        dvs.append(dot(weights.reshape(B, K, stop, -1), g, ((3,), (2,))))
        dq = dot(k_BKHT[..., :stop], dscores, ((3,), (2,)))
        dqs.append(dq.reshape(B, K, H, G, size).transpose(0, 4, 1, 3, 2))
    dq_BTNH = jnp.concatenate(dqs, axis=1).reshape(g_BTNH.shape)
    dk_BTKH, dv_BTKH = (_summed(x, bounds).transpose(0, 2, 1, 3) for x in (dks, dvs))
    return *(x.astype(k_BTKH.dtype) for x in (dq_BTNH, dk_BTKH, dv_BTKH)), None, None


def _summed(parts: list[Array], bounds: list[tuple[int, int]]) -> Array:
    """The sum of [B, K, stop, H], each zero behind its own stop."""
    sums = [
        sum(part[:, :, start:stop] for part in parts[i:]) for i, (start, stop) in enumerate(bounds)
    ]
    return jnp.concatenate(sums, axis=2)


_blocked_causal.defvjp(_blocked_fwd, _blocked_bwd)


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
        mask = _scores_mask(own, segment_ids_BT, window, 0, q_BTNH.shape[1], k_BSKH.shape[1])
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
