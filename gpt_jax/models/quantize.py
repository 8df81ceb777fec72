"""A model's weights in 8 or 16 bits: a quarter or half of the bytes that a decoded token reads.

Only weights are rounded: norms, biases, adapters and tables of positions stay f32. The model
computes with the result as with the parameters themselves.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import trees
from gpt_jax.ops import quantized
from gpt_jax.types import Array, Tree

# The token embedding lies as [V, D] already: a row is what one logit of a tied head reads.
_EMBEDDING = re.compile(r"^tokens$")
# Kernels lie as [in..., out...], stacked ones as [L, in..., out...].
_KERNEL = re.compile(r"(^|/)kernel$|^head$")
_STACKED = re.compile(r"(^|/)layers/")
# Dims that a product contracts, where it is not one.
_CONTRACTS_TWO = re.compile(r"attention/out/kernel$")


def quantize(params: Tree) -> Tree:
    """The parameters with an ops.quantized.Quantized for each weight of a product.

    The token embedding is one of them, for look-up and tied head alike: one scale for each id.

    Args:
      params: Of a Transformer, f32, in Flax's boxes or out of them.

    Raises:
      ValueError: They are of a mixture of experts.
    """
    if any(name.endswith("mlp/router") for name in trees.flatten(nn.unbox(params))):
        raise ValueError("model.num_experts: a mixture of experts has no 8-bit form")
    return trees.map_named(_quantize_leaf, nn.unbox(params))


def _quantize_leaf(name: str, leaf: Array):
    if _EMBEDDING.search(name):
        return quantized.quantize(leaf)
    if not _KERNEL.search(name):
        return leaf
    num_contract = 2 if _CONTRACTS_TWO.search(name) else 1
    first = 1 if _STACKED.search(name) else 0
    contract = range(first, first + num_contract)
    rest = [dim for dim in range(leaf.ndim) if dim not in contract]
    return quantized.quantize(jnp.transpose(leaf, (*rest, *contract)), num_contract)


def to_bfloat16(params: Tree) -> Tree:
    """The parameters with each weight of a product, and the token embedding, in bfloat16.

    Norms, biases and adapters stay f32.
    """

    def leaf(name: str, x: Array) -> Array:
        return x.astype(jnp.bfloat16) if _EMBEDDING.search(name) or _KERNEL.search(name) else x

    return trees.map_named(leaf, nn.unbox(params))


def is_bfloat16(params: Tree) -> bool:
    """Whether `to_bfloat16` made them."""
    return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def num_bytes(params: Tree) -> int:
    """What the parameters take in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nn.unbox(params)))
