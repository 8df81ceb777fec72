"""Digests of many leaves, where they lie: fast, or with little memory beside them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.ops.digests import digest

_digest = jax.jit(digest)  # traced once a shape, of which there are fewer than leaves
_PIECE = 1 << 22  # bytes that are hashed at a time where memory counts


@jax.jit
def leaf_digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """uint32[2] of each, in one program."""
    return {name: _digest(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames=("size",))
def _digest_of_piece(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Of so many rows from row `start` on."""
    piece = jax.lax.dynamic_slice_in_dim(array, start, size)
    return digest(piece, start * jnp.uint32(math.prod(array.shape[1:]) % 2**32))


def thrifty_leaf_digests(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """As `leaf_digests`, in programs that hold the bits of pieces of an array at a time."""
    return {name: _thrifty_digest(array) for name, array in arrays.items()}


def _thrifty_digest(array: jax.Array) -> np.ndarray:
    if array.nbytes <= _PIECE or len(array.sharding.device_set) > 1:
        # A piece of an array that lies on several devices would have to be gathered.
        return jax.device_get(leaf_digests({"": array}))[""]
    size = max(1, _PIECE * array.shape[0] // array.nbytes)
    words = np.zeros(2, np.uint32)
    for start in range(0, array.shape[0], size):
        size = min(size, array.shape[0] - start)
        words += jax.device_get(_digest_of_piece(array, np.uint32(start), size))
    return words
