"""Low-rank adapters (arXiv:2106.09685) from the outside: which there are, and how they end.

An adapter lies next to a kernel [in..., out...] as lora_a [in..., R] and lora_b [R, out...], with a
leading axis L where layers are stacked; models.layers.Dense computes with it.
"""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import trees
from gpt_jax.models.config import TransformerConfig, occurs
from gpt_jax.types import Array, Tree

_ADAPTER = r"(^|/)lora_[ab]$"
# The products that can have one, without the number of their layer.
_PRODUCT = re.compile(r"^(?:stack|encoder)/layers(?:_\d+)?/(.+)/kernel$")


def check_targets(params: Tree, config: TransformerConfig) -> None:
    """Raises ValueError if an entry of config.lora_targets matches no product.

    Args:
      params: Parameters of the model, arrays or shapes, in Flax's boxes or out of them.
      config: The model's.
    """
    if not config.lora_rank:
        return
    products = {name: _PRODUCT.search(name) for name in trees.flatten(nn.unbox(params))}
    products = {name.removesuffix("/kernel"): m[1] for name, m in products.items() if m}
    for pattern in config.lora_targets:
        if config.scan and "layers_" in pattern:
            raise ValueError(
                f"model.lora_targets: {pattern!r} names single layers, but model.scan makes one of "
                "all; set model.scan=False"
            )
        if not any(occurs(pattern, name) for name in products):
            raise ValueError(
                f"model.lora_targets: {pattern!r} matches no product; products are named like "
                f"{', '.join(sorted(set(products.values())))}"
            )


def adapters(params: Tree) -> Tree:
    """The adapters alone; None for every other parameter (the inverse is `trees.merge`)."""
    return trees.select(params, trees.match([_ADAPTER], params))


def merge_lora(config: TransformerConfig, params: Tree) -> tuple[TransformerConfig, Tree]:
    """The same model without adapters: each kernel becomes kernel + alpha / R * a b.

    Returns:
      The config with lora_rank 0, and its parameters.
    """
    scale = config.lora_alpha / max(config.lora_rank, 1)

    def merged(node: Tree, stacked: bool) -> Tree:
        if not isinstance(node, dict):
            return node
        node = {name: merged(child, stacked or name == "layers") for name, child in node.items()}
        if "lora_a" in node:
            product = _product(node.pop("lora_a"), node.pop("lora_b"), stacked)
            kernel = node["kernel"]
            node["kernel"] = kernel + scale * product.reshape(kernel.shape)
        return node

    return dataclasses.replace(config, lora_rank=0), merged(params, False)


def _product(a: Array, b: Array, stacked: bool) -> Array:
    """a b in f32, [L, in, out] with all dims of in and of out in one; L is 1 if not stacked."""
    L = a.shape[0] if stacked else 1
    R = a.shape[-1]
    flat_a, flat_b = a.reshape(L, -1, R), b.reshape(L, R, -1)
    return jnp.matmul(flat_a, flat_b, precision=jax.lax.Precision.HIGHEST)
