"""Lower learning rates for lower layers (arXiv:1801.06146, arXiv:2003.10555, arXiv:2106.08254)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax import trees
from gpt_jax.types import Tree

# What lies below the first layer. Heads and norms after a stack are above the last one; so are
# relative biases, which every layer uses.
_EMBEDDINGS = re.compile(r"^(tokens|token_types|(encoder_)?(positions|embed_norm/.*))$")
_LAYER = re.compile(r"^(stack|encoder)/layers(?:_(\d+))?/")


def multipliers(params: Tree, layer_decay: float) -> Tree:
    """What each parameter's learning rate is multiplied with.

    layer_decay ** (L + 1 - depth): embeddings have depth 0, layer i of L has i + 1, the final norm
    and the heads have L + 1. Each stack of an encoder-decoder is counted from its own top, since
    the encoder's last layer is one cross attention away from every layer of the decoder, its last
    included; the embeddings, which both share, lie below the deeper one.

    Args:
      params: Parameters; None where frozen. Which layers there are is read from the names, those
        of frozen ones included.

    Returns:
      A float for each leaf, an array [L, 1, ...] for one that stacks all layers.

    Raises:
      ValueError: All layers of a scanned stack are frozen, so that their number is not known.
    """
    depths = _num_layers(params)
    deepest = max(depths.values(), default=0)

    def multiplier(name: str, leaf):
        layer = _LAYER.search(name)
        if layer is None:
            return layer_decay ** (deepest + 1 if _EMBEDDINGS.search(name) else 0)
        depth = depths[layer[1]]
        if layer[2] is not None:
            return layer_decay ** (depth - int(layer[2]))
        powers = layer_decay ** np.arange(depth, 0, -1.0)
        return powers.astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))

    return trees.map_named(multiplier, params)


def scale_by_layer(layer_decay: float) -> optax.GradientTransformation:
    """Multiplies the updates, weight decay included, with `multipliers`."""

    def init(params: Tree) -> optax.EmptyState:
        _num_layers(params)  # what cannot be counted is told before the first step
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None):
        del params
        factors = multipliers(updates, layer_decay)
        scaled = jax.tree.map(lambda u, factor: u * jnp.asarray(factor, u.dtype), updates, factors)
        return scaled, state

    return optax.GradientTransformation(init, update)


def _num_layers(params: Tree) -> dict[str, int]:
    """Layers of each stack."""
    leaves, depths = trees.flatten(params), {}
    for name in trees.all_names(params):
        layer = _LAYER.search(name)
        if layer is None:
            continue
        number = depths.get(layer[1], 0)
        if layer[2] is not None:
            number = max(number, int(layer[2]) + 1)
        elif name in leaves:
            number = leaves[name].shape[0]
        depths[layer[1]] = number
    unknown = [stack for stack, number in depths.items() if not number]
    if unknown:
        raise ValueError(
            f"optimizer.layer_decay: all of {unknown[0]!r} is frozen, and stacked layers that are "
            "frozen cannot be counted; set model.scan=False"
        )
    return depths
