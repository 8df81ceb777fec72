"""A checksum of an array's bits that does not depend on how the array is sharded."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from gpt_jax.types import Array


def _mix(x: Array) -> Array:
    """The 32-bit finalizer of MurmurHash3: every input bit moves about half of the output's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# Elements that are hashed at a time on the host: about what its caches hold.
_BLOCK = 1 << 18


def digest(x: Array, first: Array | int = 0) -> Array:
    """uint32[2] over the bits and the places of the elements (of at most 32 bits each).

    Each element's bits are hashed with its linear index and the hashes are added modulo 2^32, twice
    over. Addition has no order: any sharding, mesh and host count give the same digest, without
    gathering the array. A change of one element alone always changes the first word or, with
    probability 1 - 2^-32, the second.

    Args:
      x: An array; or a piece of one, along its first dim: the pieces' digests add up to its own.
      first: uint32; the linear index of the piece's first element, modulo 2^32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index, stride = jnp.full(x.shape, first, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        # The stride wraps modulo 2^32 as the sum does.
        place = lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        index, stride = index + place * jnp.uint32(stride % 2**32), stride * x.shape[dim]
    hashed = _mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9)))
    return jnp.stack([hashed.sum(dtype=jnp.uint32), _mix(~hashed).sum(dtype=jnp.uint32)])


def digest_on_host(x: np.ndarray) -> np.ndarray:
    """`digest` of an array in host memory, in NumPy: compiles nothing and needs no device."""
    flat = np.ascontiguousarray(x).reshape(-1)
    bits = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    words = np.zeros(2, np.uint32)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
        hashed = _mix(block ^ _mix(index + np.uint32(0x9E3779B9)))
        words += np.array([part.sum(dtype=np.uint32) for part in (hashed, _mix(~hashed))])
    return words
