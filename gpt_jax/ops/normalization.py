"""Layer normalization (arXiv:1607.06450) and root-mean-square normalization (arXiv:1910.07467)."""

import jax.numpy as jnp
from jax import lax

from gpt_jax.types import Array


def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """Normalizes the last axis to mean 0, variance 1; statistics in f32, result in x.dtype."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * lax.rsqrt(variance + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divides by the root mean square of the last axis, times scale; in f32, result in x.dtype."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)
