"""Layer normalization (arXiv:1607.06450) and root-mean-square normalization (arXiv:1910.07467)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gpt_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """Normalizes the last axis to mean 0, variance 1; statistics in f32, result in x.dtype.

    The gradients are written out, of x and two numbers a row: by JAX's rules the mean and the
    variance are differentiated one behind the other, in more passes over arrays of x's size.
    """
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    rstd = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    y = centred * rstd * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, mean, rstd, scale, bias)


def _layer_norm_bwd(eps, residuals, g):
    x, mean, rstd, scale, bias = residuals
    normed = (x.astype(jnp.float32) - mean) * rstd
    g = g.astype(jnp.float32)
    dnormed = g * scale
    # What moves the mean, and what moves the variance, is taken out.
    dx = dnormed - dnormed.mean(-1, keepdims=True)
    dx = rstd * (dx - normed * (dnormed * normed).mean(-1, keepdims=True))
    return dx.astype(x.dtype), _over_rows(g * normed), None if bias is None else _over_rows(g)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def _over_rows(x: Array) -> Array:
    return x.sum(tuple(range(x.ndim - 1)))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divides by the root mean square of the last axis, times scale; in f32, result in x.dtype."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)
