"""From files to the mesh, one parameter after another: a host holds the result and one of them."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from gpt_jax import trees
from gpt_jax.convert.table import Parameter
from gpt_jax.runs import canonical
from gpt_jax.types import Tree

# Of each dim of a shard: where it begins and ends.
Place = tuple[tuple[int, int], ...]


def place(parameters: Mapping[str, Parameter], like: Tree) -> Tree:
    """Reads parameters and puts them where they belong.

    Args:
      parameters: By canonical name.
      like: ShapeDtypeStructs with shardings, of stacked or unrolled layers.
    """
    wanted, leaves = trees.flatten(canonical.unstack(parameters, like)), trees.flatten(like)
    placed = {}
    # The largest first: what one leaves free in the heap then has room for those behind it.
    for name in sorted(leaves, key=lambda name: -math.prod(leaves[name].shape)):
        placed[name] = _placed(wanted[name], leaves[name])
    return trees.unflatten(placed, like)


def _placed(parameter: Parameter, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    assert parameter.shape == leaf.shape and leaf.dtype == parameter.dtype, leaf
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    places = {device: _place(index, leaf.shape) for device, index in indices.items()}
    shards = _read(parameter, set(places.values()))
    arrays = [jax.device_put(shards[place], device) for device, place in places.items()]
    whole = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
    return jax.block_until_ready(whole)  # until then the host's copy is held


def _read(parameter: Parameter, places: set[Place]) -> dict[Place, np.ndarray]:
    """The shards of this host; each layer is read once."""
    shards = {
        place: np.empty([end - start for start, end in place], np.float32) for place in places
    }
    for i, layer in enumerate(parameter.layers()):
        for place, shard in shards.items():
            inner, to = place, shard
            if parameter.stacked:
                (first, end), *inner = place
                if not first <= i < end:
                    continue
                to = shard[i - first]
            to[...] = layer[tuple(slice(*span) for span in inner)]
    return shards


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
