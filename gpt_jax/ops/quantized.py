"""Weights as 8-bit integers with one scale for each output: symmetric, rounded to the nearest.

F stands for the dims of a weight's outputs, K for those that a product contracts. The integers lie
as [F, K]: a row is what one output reads, which is the order that decoding one token wants on CPU
(docs/speed.md). Models with stacked layers have an axis L before both.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.types import Array

# Symmetric: -128 is left out.
_LEVELS = 127


@flax.struct.dataclass
class Quantized:
    """In place of an f32 weight w in the parameters: w[K, F] = integers[F, K] * scale[F].

    Attributes:
      integers_FK: int8, within -127..127.
      scale_F: f32, at least 0.
    """

    integers_FK: Array
    scale_F: Array


def quantize(w_FK: Array, num_contract: int = 1) -> Quantized:
    """The nearest 8-bit weights; each is off by half a scale at most.

    Args:
      w_FK: A weight, its last `num_contract` dims those that a product contracts.
      num_contract: How many.
    """
    w_FK = w_FK.astype(jnp.float32)
    dims = tuple(range(w_FK.ndim - num_contract, w_FK.ndim))
    top = jnp.abs(w_FK).max(dims, keepdims=True)
    # A row of zeros has scale 0; it is divided by 1.
    scale = top / _LEVELS
    integers = jnp.round(w_FK / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Quantized(integers, scale.squeeze(dims))


def dequantize(w: Quantized) -> Array:
    """The weights that it stands for, f32 [F, K]."""
    num_contract = w.integers_FK.ndim - w.scale_F.ndim
    scale = w.scale_F.reshape(*w.scale_F.shape, *(1,) * num_contract)
    return w.integers_FK.astype(jnp.float32) * scale


def look_up(table: Array | Quantized, ids: Array) -> Array:
    """Rows of an embedding [V, D], f32, bf16 or 8-bit: f32 [*ids.shape, D]."""
    if isinstance(table, Quantized):
        taken = Quantized(*(jnp.take(x, ids, axis=0) for x in (table.integers_FK, table.scale_F)))
        return dequantize(taken)
    if table.dtype == jnp.bfloat16:
        # Or XLA:CPU would convert all of the table to f32 in front of the loop that decodes.
        table, ids = jax.lax.optimization_barrier((table, ids))
    return jnp.take(table, ids, axis=0).astype(jnp.float32)
