"""Layer normalization (arXiv:1607.06450) and root-mean-square normalization (arXiv:1910.07467).

Their gradients are written out, of x and of one or two numbers a row: by JAX's rules mean and
variance are differentiated one behind the other, in more passes over arrays of x's size. What is
computed of a sum stands behind a barrier, or XLA:CPU's library would compute it with the sum, as
an array of x's size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gpt_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """Normalizes the last axis to mean 0, variance 1; statistics in f32, result in x.dtype."""
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    x32, ones = x.astype(jnp.float32), jnp.ones_like(scale)
    mean = lax.optimization_barrier(_mean_of_rows(x32, ones))
    centred = x32 - mean
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    rstd = lax.optimization_barrier(lax.rsqrt(_mean_of_rows(jnp.square(centred), ones) + eps))
    y = centred * rstd * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, mean, rstd, scale, bias)


def _layer_norm_bwd(eps, residuals, g):
    x, mean, rstd, scale, bias = residuals
    g, normed = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * rstd
    # What moves the mean, and what moves the variance, is taken out.
    move, stretch = lax.optimization_barrier(
        (_mean_of_rows(g, scale), _mean_of_rows(g * normed, scale))
    )
    dx = rstd * (g * scale - move - normed * stretch)
    dbias = None if bias is None else _sum_over_rows(g)
    return dx.astype(x.dtype), _sum_over_rows(g * normed), dbias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divides by the root mean square of the last axis, times scale; in f32, result in x.dtype."""
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    mean_square = _mean_of_rows(jnp.square(x32), jnp.ones_like(scale))
    rstd = lax.optimization_barrier(lax.rsqrt(mean_square + eps))
    return (x32 * rstd * scale).astype(x.dtype), (x, rstd, scale)


def _rms_norm_bwd(eps, residuals, g):
    x, rstd, scale = residuals
    g, normed = g.astype(jnp.float32), x.astype(jnp.float32) * rstd
    stretch = lax.optimization_barrier(_mean_of_rows(g * normed, scale))
    dx = rstd * (g * scale - normed * stretch)
    return dx.astype(x.dtype), _sum_over_rows(g * normed)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


# XLA:CPU's library takes a sum together with what leads to it, slowly; a product with a vector, and
# what leads to it, are loops of XLA's own.
_dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)


def _mean_of_rows(x: Array, weights: Array) -> Array:
    """Of x[..., D] weights[D] over D: [..., 1]."""
    last = (((x.ndim - 1,), (0,)), ((), ()))
    sums = lax.platform_dependent(
        x, weights, cpu=lambda x, w: _dot(x, w, last), default=lambda x, w: (x * w).sum(-1)
    )
    return sums[..., None] / weights.size


def _sum_over_rows(x: Array) -> Array:
    """Of x[..., D] over all dims but the last: [D]."""
    lead = tuple(range(x.ndim - 1))
    over = ((lead, lead), ((), ()))
    return lax.platform_dependent(
        x, cpu=lambda x: _dot(jnp.ones(x.shape[:-1]), x, over), default=lambda x: x.sum(lead)
    )
