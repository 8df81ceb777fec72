"""The stack of blocks: the one place where scan and rematerialization are decided."""

import operator

import flax.linen as nn
import jax

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.layer_kinds import layer_kinds
from gpt_jax.models.layers import Block, Context, LayerCache
from gpt_jax.types import Array

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
    """num_layers blocks; with `cross` they attend to an encoder's outputs too.

    Parameters lie under `layers` with a leading axis L when scanned, under `layers_0`, `layers_1`,
    ... when unrolled; the cache likewise is one LayerCache of [L, ...] leaves or a list of them.
    """

    config: TransformerConfig
    deterministic: bool
    num_layers: int
    cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | list[LayerCache] | None
    ) -> tuple[Array, LayerCache | list[LayerCache] | None]:
        c, kinds = self.config, layer_kinds(self.config)
        block = Block
        if c.remat != "none":
            # Inside scan nothing can be merged across the loop's iterations: no barrier needed.
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat], prevent_cse=not c.scan)
        if c.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                out_axes=0,
                length=self.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            scanned = layers(c, self.deterministic, self.cross, name="layers")
            return scanned(x_BTD, context, cache, kinds)
        caches = []
        for i in range(self.num_layers):
            layer_cache = None if cache is None else cache[i]
            layer = block(c, self.deterministic, self.cross, name=f"layers_{i}")
            kind = jax.tree.map(operator.itemgetter(i), kinds)
            x_BTD, layer_cache = layer(x_BTD, context, layer_cache, kind)
            caches.append(layer_cache)
        return x_BTD, None if cache is None else caches
