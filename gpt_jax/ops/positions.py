"""Rotary position embedding (arXiv:2104.09864), rotate-half as Hugging Face stores it."""

import jax.numpy as jnp

from gpt_jax.types import Array


def rotary_tables(positions_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin, f32[B, T, 1, H/2], of the angles position * theta^(-2i/H)."""
    # f32: in bf16 positions above 256 would collide.
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x[i], x[i + H/2]) by the tables' angles; computed in f32."""
    cos, sin = tables
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
