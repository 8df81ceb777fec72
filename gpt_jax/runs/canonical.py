"""One layout for checkpoints: leaves of `layers_0`, `layers_1`, ... stacked along L as `layers`.

So scan or unrolled layers, and the optimizer's slots with them, are free to change.
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import trees
from gpt_jax.types import Tree

_LAYER = re.compile(r"(^|/)layers_(\d+)(/|$)")


def _groups(names: list[str]) -> dict[str, list[str]]:
    """Canonical name -> the leaves it is made of, in the order of the layers."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        found = _LAYER.search(name)
        canonical = _LAYER.sub(r"\1layers\3", name) if found else name
        groups.setdefault(canonical, []).append((int(found[2]) if found else -1, name))
    return {canonical: [name for _, name in sorted(group)] for canonical, group in groups.items()}


def is_canonical(names: Iterable[str]) -> bool:
    """Whether nothing is left to stack."""
    return not any(_LAYER.search(name) for name in names)


def stack(tree: Tree) -> dict[str, jax.Array]:
    """{canonical name: array}; to be jitted where the arrays are sharded."""
    leaves = trees.flatten(tree)
    return {
        canonical: jnp.stack([leaves[name] for name in group])
        if _LAYER.search(group[0])
        else leaves[group[0]]
        for canonical, group in _groups(list(leaves)).items()
    }


def stacked_target(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """What `stack` would give for a tree of ShapeDtypeStructs, with the shardings that follow."""
    leaves, target = trees.flatten(tree), {}
    for canonical, group in _groups(list(leaves)).items():
        leaf = leaves[group[0]]
        shape, sharding = leaf.shape, leaf.sharding
        if _LAYER.search(group[0]):
            shape = (len(group), *shape)
            if sharding is not None:
                sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        target[canonical] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    return target


def unstack(arrays: dict[str, jax.Array], like: Tree) -> Tree:
    """The inverse of `stack`: the tree of the structure of `like`."""
    leaves = {}
    for canonical, group in _groups(list(trees.flatten(like))).items():
        for i, name in enumerate(group):
            leaves[name] = arrays[canonical][i] if _LAYER.search(name) else arrays[canonical]
    return trees.unflatten(leaves, like)
