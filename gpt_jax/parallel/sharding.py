"""One table from logical axes to mesh axes, and what follows from it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax import trees
from gpt_jax.types import Array, Tree

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "expert": ("expert",),
    "rows_of_an_expert": ("data", "fsdp"),
    "length": ("sequence",),
    "kv_length": (),
    "positions": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "layers": ("stage",),
    "buckets": (),
    "types": (),
    "classes": (),
    "rank": (),
    None: (),
}


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh.

    A dim that its mesh axes do not divide is replicated (a single key/value head, a vocabulary
    of 50257). Two dims may not claim one mesh axis.
    """
    assert len(names) == len(shape), (names, shape)
    entries, used = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
        if size % int(np.prod([mesh.shape[axis] for axis in axes])):
            axes = ()
        assert not used & set(axes), f"{names}: {axes} claimed twice"
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
    return PartitionSpec(*entries)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use (jax.set_mesh); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def constrain(x: Array, *names: str | None) -> Array:
    """Fixes how an activation lies on the mesh in use (jax.set_mesh); without one, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def param_shardings(boxed: Tree, mesh: Mesh) -> Tree:
    """NamedShardings of the parameters of an abstract init with Flax's logical metadata."""

    def sharding(leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        return NamedSharding(mesh, spec(names, shape, mesh))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def state_shardings(state: Tree, params: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """Shardings of a whole state: what ends in a parameter's path and has its shape lies like it.

    So do the optimizer's slots, whatever structure they are kept in; the rest is replicated.
    """
    by_path = trees.flatten(shardings)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: str, leaf) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            suffix = "/".join(parts[start:])
            if suffix in by_path and shapes[suffix] == leaf.shape:
                return by_path[suffix]
        return replicated

    return trees.map_named(sharding, state)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of a global batch lies: [B] or [B, T, ...], rows over "batch", T over "length".

    A target of a whole row, [B, C], has no T; where C is split like one, nothing is computed twice
    or wrongly.
    """
    names = ("batch", "length", *(None,) * len(shape))[: len(shape)]
    return NamedSharding(mesh, spec(names, shape, mesh))


def abstract_batch(rows: dict[str, np.ndarray], batch_size: int, mesh: Mesh):
    """Shapes with shardings of a global batch, from some rows of it."""
    shapes = {name: (batch_size, *array.shape[1:]) for name, array in rows.items()}
    return {
        name: jax.ShapeDtypeStruct(shape, rows[name].dtype, sharding=batch_sharding(mesh, shape))
        for name, shape in shapes.items()
    }


def check_batch_size(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets whole rows of every microbatch."""
    shards = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
    if batch_size % (shards * num_microbatches):
        raise ValueError(
            f"train.batch_size: {batch_size} is not a multiple of {shards * num_microbatches}, "
            f"the mesh's {' x '.join(RULES['batch'])} {shards} times train.num_microbatches "
            f"{num_microbatches}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Positions inside the global batch that this process's devices need, sorted: int64[n]."""
    indices = batch_sharding(mesh, (batch_size,)).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in indices.values()]))


def global_batch(host_batch: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh):
    """Global arrays from this process's rows (`rows`: their positions in the global batch)."""

    def place(local: np.ndarray) -> Array:
        def shard(index) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return local[np.searchsorted(rows, wanted)][(slice(None), *index[1:])]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), shard)

    return {name: place(array) for name, array in host_batch.items()}


def fetch(tree: Tree) -> Tree:
    """Copies on the host; of arrays that lie partly with other processes the whole, if all ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        there = not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable
        return x if there else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def on_mesh(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` run with the mesh in use, so that `constrain` inside it sees the mesh."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with jax.set_mesh(mesh):
            return fn(*args, **kwargs)

    return wrapped
