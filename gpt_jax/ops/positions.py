"""Positions: rotary (arXiv:2104.09864), sinusoidal (arXiv:1706.03762), relative (arXiv:1910.10683).

B batch, T queries, S keys, N heads, H head width, D model width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.types import Array


def rotary_tables(
    positions_BT: Array, head_dim: int, theta: float, scaling: Any = None
) -> tuple[Array, Array]:
    """cos and sin, f32[B, T, 1, H/2], of the angles position * theta^(-2i/H).

    Args:
      positions_BT: Positions of the tokens.
      head_dim: H.
      theta: Base of the frequencies.
      scaling: A models.config.RopeScaling; None: none.
    """
    frequency, length = rotary_frequencies(head_dim, theta, scaling)
    # f32: in bf16 positions above 256 would collide.
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return length * jnp.cos(angle), length * jnp.sin(angle)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Any = None
) -> tuple[np.ndarray, float]:
    """(frequencies, f32[H/2]; what queries and keys are multiplied by); see `rotary_tables`."""
    # Rounded as Hugging Face's: the power to f32, then its inverse. One unit in the last place is
    # an angle of 1e-5 at position 500.
    power = np.asarray(theta ** (np.arange(0, head_dim, 2) / head_dim), np.float32)
    kind = "none" if scaling is None else scaling.kind
    return _SCALINGS[kind](power, theta, scaling)


def _unscaled(power, theta, scaling):
    return np.float32(1) / power, 1.0


def _linear(power, theta, scaling):
    return np.float32(1) / power / np.float32(scaling.factor), 1.0


def _llama3(power, theta, scaling):
    """Long waves are stretched, short ones kept (arXiv:2407.21783)."""
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    kept = np.float32(1) / power
    stretched = kept / np.float32(scaling.factor)
    # Waves within the length of the training.
    waves = np.float32(scaling.original_length) / (np.float32(2 * math.pi) / kept)
    share = np.clip((waves - low) / (high - low), 0, 1)
    return ((1 - share) * stretched + share * kept).astype(np.float32), 1.0


def _yarn(power, theta, scaling):
    """Arxiv:2309.00071, section 3.2, and the factor of section 3.4."""
    pairs = len(power)

    def pair_of(rotations: float) -> float:
        """Which pair turns so often within the length of the training."""
        waves = scaling.original_length / (rotations * 2 * math.pi)
        return pairs * math.log(waves) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last += 0.001 if first == last else 0.0
    kept = np.float32(1) / power
    stretched = np.float32(1) / (np.float32(scaling.factor) * power)
    share = np.clip((np.arange(pairs, dtype=np.float32) - first) / (last - first), 0, 1)
    frequency = (stretched * share + kept * (1 - share)).astype(np.float32)
    longer = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequency, scaling.attention_factor or longer


_SCALINGS = {"none": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def rotate(x_BTNH: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x[i], x[i + H/2]) by the tables' angles, as Hugging Face stores them.

    Computed in f32.
    """
    cos, sin = tables
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def sinusoids(positions_BT: Array, width: int) -> Array:
    """f32[B, T, D]: sin and cos, in turn, of position / 10000^(2i/D)."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions_BT[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], width)


def relative_bias(
    table: Array, queries_BT: Array, keys_BS: Array, *, max_distance: int, bidirectional: bool
) -> Array:
    """T5's bias of the scores, f32[B, N, T, S].

    Args:
      table: [buckets, N].
      queries_BT: Positions of the queries.
      keys_BS: Positions of the keys.
      max_distance: From here on all distances share the last bucket.
      bidirectional: Half of the buckets are for keys behind the query; otherwise those all share
        the bucket of distance 0.
    """
    bucket_BTS = relative_bucket(
        keys_BS[:, None, :] - queries_BT[:, :, None], table.shape[0], max_distance, bidirectional
    )
    # A product with the one-hot rows: its gradient is a product too, where that of a gather would
    # be a scatter over all pairs.
    one_hot = jax.nn.one_hot(bucket_BTS, table.shape[0], dtype=jnp.float32)
    return jnp.einsum("btsr,rn->bnts", one_hot, table, precision=jax.lax.Precision.HIGHEST)


def relative_bucket(
    distance: Array, num_buckets: int, max_distance: int, bidirectional: bool
) -> Array:
    """The bucket of each distance (key minus query), int32: exact when near, logarithmic when far.

    Half of the buckets of a side are for the distances 0, 1, ...; the rest grow like the logarithm
    up to max_distance.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    # In the order of Hugging Face's operations, so that borders round alike.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    scale = (num_buckets - exact) / math.log(max_distance / exact)
    far = exact + (ratio * scale).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)
