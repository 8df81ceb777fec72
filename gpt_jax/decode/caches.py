"""Caches of keys and values on the move: made, resized, copied row by row, laid on a mesh.

B rows, S places, M places of an encoder's outputs, K key/value heads, H head width, L layers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt_jax.models.layers import LayerCache
from gpt_jax.models.transformer import Cache, Transformer, make_cache
from gpt_jax.ops import key_pages, products
from gpt_jax.ops.key_pages import KeyPages
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array


def empty(model: Transformer, num_rows: int, length: int, memory_length: int) -> Cache:
    """A cache of zeros on the mesh in use, with a memory if the model has an encoder."""
    platform = model.platform or jax.default_backend()
    config = model.config
    return _empty(
        config=config, dtype=products.precision(config.dtype, platform).cache,
        paged=platform == "cpu" and config.num_kv_heads < config.num_heads,
        num_rows=num_rows, length=length, memory_length=memory_length,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("config", "dtype", "paged", "num_rows", "length", "memory_length")
)
def _empty(
    *, config, dtype: str, paged: bool, num_rows: int, length: int, memory_length: int
) -> Cache:
    cache = make_cache(config, num_rows, length, dtype, paged)
    if config.family == "encoder_decoder":

        def with_memory(layer: LayerCache) -> LayerCache:
            # An array of its own for each: shared ones could not be donated.
            shape = (*layer.v_BKSH.shape[:-2], memory_length, layer.v_BKSH.shape[-1])
            return layer.replace(
                memory_k_BKSH=jnp.zeros(shape, layer.v_BKSH.dtype),
                memory_v_BKSH=jnp.zeros(shape, layer.v_BKSH.dtype),
            )

        segments = jnp.zeros((num_rows, memory_length), jnp.int32)
        cache = Cache(_map(with_memory, cache.layers), cache.index_B, segments)
    return laid(cache)


@functools.partial(jax.jit, static_argnames=("length", "memory_length"))
def resized(cache: Cache, rows_B: Array, *, length: int, memory_length: int = 0) -> Cache:
    """A cache of `length` places whose row b is the old row rows_B[b], cut or with zeros behind.

    Its index is not kept: who decodes knows the lengths.
    """

    def layer(old: LayerCache) -> LayerCache:
        def take(array: Array | None, size: int) -> Array | None:
            return None if array is None else _fit(jnp.take(array, rows_B, array.ndim - 4), size)

        keys = old.k_BKSH
        paged = isinstance(keys, KeyPages)
        rows = key_pages.num_rows(length, keys.width) if paged else length
        return LayerCache(
            jax.tree.map(lambda array: take(array, rows), keys),
            take(old.v_BKSH, length),
            take(old.memory_k_BKSH, memory_length),
            take(old.memory_v_BKSH, memory_length),
        )

    segments = cache.memory_segments_BS
    if segments is not None:
        segments = _fit_last(segments[rows_B], memory_length)
    return laid(Cache(_map(layer, cache.layers), jnp.zeros_like(rows_B), segments))


def reordered(cache: Cache, rows_B: Array) -> Cache:
    """The cache whose row b is the old row rows_B[b], but for what an encoder left: rows change
    places within a prompt only."""

    def layer(old: LayerCache) -> LayerCache:
        own = (old.k_BKSH, old.v_BKSH)
        k_BKSH, v_BKSH = jax.tree.map(lambda x: jnp.take(x, rows_B, x.ndim - 4), own)
        return old.replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH)

    return cache.replace(layers=_map(layer, cache.layers), index_B=cache.index_B[rows_B])


def with_row(cache: Cache, other: Cache, row: Array, slot: Array) -> Cache:
    """The cache with its row `slot` replaced by a row of another one, to its last place.

    Nothing of the slot's former row is left, not even behind what is seen: a NaN there would come
    through the mask.
    """

    def put(into: Array, source: Array) -> Array:
        axis = into.ndim - 4
        taken = jax.lax.dynamic_index_in_dim(source, row, axis, keepdims=True)
        taken = _fit(taken, into.shape[-2]).astype(into.dtype)
        return jax.lax.dynamic_update_slice_in_dim(into, taken, slot, axis)

    layers = jax.tree.map(put, cache.layers, other.layers)
    segments = cache.memory_segments_BS
    if segments is not None:
        own = _fit_last(other.memory_segments_BS[row], segments.shape[-1])
        segments = segments.at[slot].set(own)
    return laid(cache.replace(layers=layers, memory_segments_BS=segments))


def laid(cache: Cache) -> Cache:
    """The cache as it lies on the mesh in use: rows over data, heads over tensor."""

    def lay(array: Array) -> Array:
        names = ("batch", "kv_heads", "kv_length", "head_dim")
        return constrain(array, *("layers",) * (array.ndim - 4), *names)

    return cache.replace(layers=jax.tree.map(lay, cache.layers))


def _map(function: Callable[[LayerCache], LayerCache], layers):
    return jax.tree.map(function, layers, is_leaf=lambda x: isinstance(x, LayerCache))


def _fit(array: Array, length: int) -> Array:
    """[..., length, H]."""
    array = array[..., :length, :]
    missing = length - array.shape[-2]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, missing), (0, 0)])


def _fit_last(array: Array, length: int) -> Array:
    array = array[..., :length]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])])
