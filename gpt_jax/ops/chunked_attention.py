"""Attention for long rows: chunk after chunk of queries, each device of `sequence` its own ones.

B batch, T queries, S keys, N query heads, K key/value heads, G = N // K, H head width.

Where the mesh in use has an axis `sequence`, a device holds T / n of a row's queries, keys and
values. It gathers the keys and values of the whole row, S K H numbers each, and attends from its
own queries alone; the gradients of keys and values go back as one sum over the devices. So the
softmax of a query is over all of its keys at once, as on one device. The scores, which would be
N T S numbers, exist for one chunk of queries at a time, in the backward pass too, where they are
computed again.

Every query meets every key of the row, hidden ones too: twice the products that a causal row needs,
the same number on each device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt_jax.ops import products
from gpt_jax.ops.scores import attend, heads_first
from gpt_jax.types import Array

_AXIS = "sequence"
# Queries of a chunk: enough for a product to be fast, few enough for its scores to be small.
_CHUNK = 128


def devices_of_a_row() -> int:
    """Size of the axis `sequence` of the mesh in use (jax.set_mesh); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(_AXIS, 1)


def chunked(
    q_BTNH, k_BSKH, v_BSKH, *, causal, segment_ids_BT, window, mask_BTS, bias_BNTS, softcap,
    precision,
):  # fmt: skip
    """See ops.attention.attention."""
    arrays = {
        "q": q_BTNH,
        # In the dtype of the activations, in which their gradients are summed over the devices.
        "k": k_BSKH,
        "v": v_BSKH,
        "query_segments": segment_ids_BT,
        "key_segments": segment_ids_BT,
        "window": window,
        "mask": mask_BTS,
        "bias": bias_BNTS,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    share = functools.partial(_share, causal=causal, softcap=softcap, precision=precision)
    number = devices_of_a_row()
    if number == 1 or q_BTNH.shape[1] % number or k_BSKH.shape[1] % number:
        return share(arrays, first=0)

    def of_a_device(arrays: dict[str, Array]) -> Array:
        first = jax.lax.axis_index(_AXIS) * arrays["q"].shape[1]
        gathered = {
            name: jax.lax.all_gather(arrays[name], _AXIS, axis=1, tiled=True)
            for name in ("k", "v", "key_segments")
            if name in arrays
        }
        return share(arrays | gathered, first=first)

    by_length = PartitionSpec(None, _AXIS)
    specs = {"window": PartitionSpec(), "bias": PartitionSpec(None, None, _AXIS)}
    # The other axes stay the compiler's: batch and heads lie as they did.
    return jax.shard_map(
        of_a_device,
        in_specs=({name: specs.get(name, by_length) for name in arrays},),
        out_specs=by_length,
        axis_names={_AXIS},
    )(arrays)


def _share(arrays: dict[str, Array], *, first, causal, softcap, precision) -> Array:
    """[B, T, N, H] of T queries, the first of which is number `first` of its row."""
    q_BTNH = arrays["q"]
    B, T, N, H = q_BTNH.shape
    k_BKSH, v_BKSH = (heads_first(arrays[name]) for name in "kv")
    number = -(-T // _CHUNK)
    size = -(-T // number)
    # The dim of length of what is cut.
    lengths = {"q": 1, "query_segments": 1, "mask": 1, "bias": 2}
    chunks = {
        name: _cut(arrays[name], dim, number, size)
        for name, dim in lengths.items()
        if name in arrays
    }

    def attend_from(chunk: dict[str, Array]) -> Array:
        mask = _visible(arrays, chunk, size, k_BKSH.shape[2], causal)
        q_BKGTH = heads_first(chunk["q"]).reshape(B, k_BKSH.shape[1], -1, size, H)
        out = attend(q_BKGTH, k_BKSH, v_BKSH, mask, chunk.get("bias"), softcap, precision)
        out_BTNH = out.reshape(B, N, size, H).transpose(0, 2, 1, 3)
        return products.to_compute(out_BTNH, precision)

    # Inside a loop nothing can be merged across iterations: no barrier needed.
    attend_from = jax.checkpoint(attend_from, prevent_cse=False)
    starts = first + size * jnp.arange(number)
    outs = jax.lax.map(attend_from, chunks | {"start": starts})
    return outs.swapaxes(0, 1).reshape(B, number * size, N, H)[:, :T]


def _cut(x: Array, dim: int, number: int, size: int) -> Array:
    """[number, ...] with `size` of `dim` each; the last is filled up with zeros."""
    missing = number * size - x.shape[dim]
    x = jnp.pad(x, [(0, missing if i == dim else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:dim], number, size, *x.shape[dim + 1 :])
    return jnp.moveaxis(x, dim, 0)


def _visible(arrays, chunk, size: int, num_keys: int, causal: bool) -> Array | None:
    """Boolean [B or 1, 1, 1, size, S], True = attend; None if all is visible."""
    masks = []
    if "mask" in arrays:
        masks.append(chunk["mask"][:, None, None])
    elif "key_segments" in arrays:
        queries, keys = chunk["query_segments"], arrays["key_segments"]
        masks.append((queries[:, :, None] == keys[:, None, :])[:, None, None])
    if causal:
        behind = (chunk["start"] + jnp.arange(size))[:, None] - jnp.arange(num_keys)
        masks.append(behind >= 0)
        if "window" in arrays:
            masks.append(behind < arrays["window"])
    return functools.reduce(jnp.logical_and, masks) if masks else None
