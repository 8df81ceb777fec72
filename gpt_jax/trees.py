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


def num_elements(tree: Tree) -> int:
    """Total elements of the leaves (arrays or ShapeDtypeStructs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
