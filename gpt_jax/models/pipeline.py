"""Layers on several groups of devices, through which microbatches run one behind another.

B batch, M microbatches, b = B / M rows of one, S stages, L layers, T length, D width.

The stacked layers lie over the mesh axis `stage`: stage s holds L / S of them, from number s L / S
on. One array [S, b, T, D] holds what each stage works on. At every tick all stages run their layers
at once (a vmap over the axis that is split over the devices), then all move on by one place: the
next microbatch comes in at stage 0, a finished one goes out behind the last (GPipe,
arXiv:1811.06965; as one program with a shifting buffer: GSPMD, arXiv:2105.04663, section 3.3).
After M + S - 1 ticks all are through; in (S - 1) / (M + S - 1) of its time a stage computes what
nobody reads. The backward pass is the transposed program: the same ticks in the other direction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt_jax.models.layer_kinds import LayerKind
from gpt_jax.models.layers import Context
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array, Tree

# (parameters of a layer, x [b, T, D], context, kind, key or None) -> x
Layer = Callable[[Tree, Array, Context, LayerKind, Array | None], Array]


def pipelined(
    layer: Layer,
    params_L: Tree,
    x_BTD: Array,
    context: Context,
    kinds_L: LayerKind,
    key: Array | None,
    *,
    num_stages: int,
    num_microbatches: int,
) -> Array:
    """[B, T, D], what the layers make of x.

    Args:
      layer: One layer.
      params_L: Its parameters, with an axis L in front, a multiple of num_stages.
      x_BTD: Into the first layer.
      context: For all rows.
      kinds_L: Of the layers.
      key: Of the dropout; None: there is none.
      num_stages: Size of the mesh axis `stage`.
      num_microbatches: B is a multiple of it. Microbatch m holds the rows m, m + M, ..., so that
        each device keeps the rows it has.
    """
    S, M = num_stages, num_microbatches
    L = jax.tree.leaves(params_L)[0].shape[0]
    B = x_BTD.shape[0]
    assert L % S == 0 and B % M == 0, (L, S, B, M)
    layers = (params_L, kinds_L, jnp.arange(L))
    layers_S = jax.tree.map(lambda x: x.reshape(S, L // S, *x.shape[1:]), layers)
    rows_MbTD = constrain(_split(x_BTD, 0, B, M), None, "batch", "length", None)
    context_M = _split_context(context, B, M)

    def stage(layers, x_bTD: Array, number: Array) -> Array:
        """One stage's layers for microbatch `number`."""
        own = _context_of(context_M, context, B, number)

        def one(x_bTD, layer_and_kind):
            params, kind, place = layer_and_kind
            own_key = None
            if key is not None:
                own_key = jax.random.fold_in(jax.random.fold_in(key, number), place)
            return layer(params, x_bTD, own, kind, own_key), None

        return jax.lax.scan(one, x_bTD, layers)[0]

    def lay(x_SbTD: Array) -> Array:
        return constrain(x_SbTD, "layers", "batch", "length", None)

    def tick(x_SbTD: Array, now: Array):
        coming = jax.lax.dynamic_index_in_dim(rows_MbTD, jnp.minimum(now, M - 1), keepdims=False)
        x_SbTD = lay(jnp.roll(x_SbTD, 1, axis=0).at[0].set(coming))
        numbers_S = jnp.clip(now - jnp.arange(S), 0, M - 1)
        x_SbTD = lay(jax.vmap(stage)(layers_S, x_SbTD, numbers_S))
        return x_SbTD, x_SbTD[-1]

    empty = lay(jnp.zeros((S, *rows_MbTD.shape[1:]), x_BTD.dtype))
    _, out = jax.lax.scan(tick, empty, jnp.arange(M + S - 1))
    out_BTD = out[S - 1 :].swapaxes(0, 1).reshape(x_BTD.shape)
    return constrain(out_BTD, "batch", "length", None)


def _split(x: Array, dim: int, B: int, M: int) -> Array:
    """[..., B, ...] -> [M, ..., B / M, ...]."""
    x = x.reshape(*x.shape[:dim], B // M, M, *x.shape[dim + 1 :])
    return jnp.moveaxis(x, dim + 1, 0)


def _rows_dim(x: Array, B: int, from_end: int) -> int | None:
    """The dim of rows, counted from the end; None if all rows share one."""
    dim = x.ndim - from_end
    return dim if x.shape[dim] == B > 1 else None


# Arrays of a context by the place of their rows, from the end.
_FROM_END = {"segment_ids_BT": 2, "mask_BTT": 3, "bias_BNTS": 4}
_ROTARY_FROM_END = 4


def _split_context(context: Context, B: int, M: int) -> Context:
    def split(x: Array | None, from_end: int) -> Array | None:
        dim = None if x is None else _rows_dim(x, B, from_end)
        return x if dim is None else _split(x, dim, B, M)

    assert context.memory_BSD is None and context.cache_index_B is None
    fields = {name: split(getattr(context, name), end) for name, end in _FROM_END.items()}
    rotary = context.rotary
    if rotary is not None:
        rotary = tuple(split(x, _ROTARY_FROM_END) for x in rotary)
    return context.replace(**fields, rotary=rotary)


def _context_of(context_M: Context, context: Context, B: int, number: Array) -> Context:
    """The context of one microbatch; `context` tells which arrays were split."""

    def pick(split: Array | None, whole: Array | None, from_end: int) -> Array | None:
        if whole is None or _rows_dim(whole, B, from_end) is None:
            return whole
        return jax.lax.dynamic_index_in_dim(split, number, keepdims=False)

    fields = {
        name: pick(getattr(context_M, name), getattr(context, name), end)
        for name, end in _FROM_END.items()
    }
    rotary = context.rotary
    if rotary is not None:
        pairs = zip(context_M.rotary, rotary, strict=True)
        rotary = tuple(pick(split, whole, _ROTARY_FROM_END) for split, whole in pairs)
    return context.replace(**fields, rotary=rotary)
