"""Trees with named leaves: every rule here (decay, sharding, freezing) goes by path."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from gpt_jax.types import Tree


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")


def path_name(path: Iterable[Any]) -> str:
    """The name of a leaf: its keys joined by '/'."""
    return "/".join(_name(key) for key in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """{'a/b/c': leaf} in the order of jax.tree.leaves."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def all_names(tree: Tree) -> list[str]:
    """Names of the leaves, the Nones that `select` left included."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return [path_name(path) for path, _ in paths]


def unflatten(leaves: dict[str, Any], like: Tree) -> Tree:
    """The tree of the structure of `like` whose leaves are taken by name from `leaves`."""
    return map_named(lambda name, _: leaves[name], like)


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like jax.tree.map, with the leaf's name as first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: fn(path_name(path), *xs), tree, *rest)


def match(patterns: Iterable[str], tree: Tree) -> Tree:
    """A tree of booleans: does a pattern occur (re.search) in the leaf's name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return map_named(lambda name, _: any(p.search(name) for p in compiled), tree)


def select(tree: Tree, mask: Tree) -> Tree:
    """The tree with None for every leaf whose place in `mask` is False.

    None is a tree without leaves for JAX: what is not selected is neither differentiated,
    optimized nor saved, while its place in the structure stays. `merge` is the inverse.
    """
    return jax.tree.map(lambda leaf, selected: leaf if selected else None, tree, mask)


def merge(first: Tree, second: Tree) -> Tree:
    """One tree of two that `select` made: each leaf is in exactly one of them."""

    def either(a: Any, b: Any) -> Any:
        assert (a is None) != (b is None), "a leaf is in both trees or in neither"
        return b if a is None else a

    return jax.tree.map(either, first, second, is_leaf=lambda leaf: leaf is None)


def num_elements(tree: Tree) -> int:
    """Total elements of the leaves (arrays or ShapeDtypeStructs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
