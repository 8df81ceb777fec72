"""The stack of blocks: the one place where scan and rematerialization are decided."""

import operator

import flax.linen as nn
import jax

from gpt_jax.models.block import Block
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.experts import ROUTER
from gpt_jax.models.layer_kinds import layer_kinds
from gpt_jax.models.layers import Context, LayerCache
from gpt_jax.models.pipeline import pipelined
from gpt_jax.parallel.sharding import axis_size
from gpt_jax.types import Array

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
    """num_layers blocks; with `cross` they attend to an encoder's outputs too.

    Where the mesh in use has an axis `stage`, scanned layers run as a pipeline of num_microbatches
    parts of the batch (models.pipeline).

    Parameters lie under `layers` with a leading axis L when scanned, under `layers_0`, `layers_1`,
    ... when unrolled; the cache likewise is one LayerCache of [L, ...] leaves or a list of them.
    """

    config: TransformerConfig
    deterministic: bool
    num_layers: int
    cross: bool = False
    num_microbatches: int = 1

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | list[LayerCache] | None
    ) -> tuple[Array, LayerCache | list[LayerCache] | None]:
        c, kinds = self.config, layer_kinds(self.config)
        block = Block
        if c.remat != "none":
            # Inside scan nothing can be merged across the loop's iterations: no barrier needed.
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat], prevent_cse=not c.scan)
        num_stages = axis_size("stage")
        if num_stages > 1 and cache is None and not self.is_initializing():
            return self._pipelined(x_BTD, context, num_stages), None
        if c.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0} | ({ROUTER: 0} if c.num_experts else {}),
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

    def _pipelined(self, x_BTD: Array, context: Context, num_stages: int) -> Array:
        """Over the mesh axis `stage`, to which the stacked parameters are spread."""
        c, deterministic = self.config, self.deterministic
        assert c.scan and not self.cross and not c.num_experts, "train.mesh_checks refuses these"

        def layer(params, x_bTD, context, kind, key):
            rngs = None if key is None else {"dropout": key}
            block = Block(c, deterministic, parent=None)
            return block.apply({"params": params}, x_bTD, context, None, kind, rngs=rngs)[0]

        if c.remat != "none":
            policy = _REMAT_POLICIES[c.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        drops = c.dropout > 0 and not deterministic
        return pipelined(
            layer, self.variables["params"]["layers"], x_BTD, context, layer_kinds(c),
            self.make_rng("dropout") if drops else None,
            num_stages=num_stages, num_microbatches=self.num_microbatches,
        )  # fmt: skip
