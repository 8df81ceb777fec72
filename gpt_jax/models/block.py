"""One block of a stack: attention and MLP, each with norm and residual.

B batch, T length, D width.
"""

import flax.linen as nn

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.experts import Experts
from gpt_jax.models.layer_kinds import LayerKind
from gpt_jax.models.layers import MLP, Attention, Context, LayerCache, Norm
from gpt_jax.types import Array


class Block(nn.Module):
    """Self-attention, cross attention if there is a memory, MLP or experts; each with norm and
    residual."""

    config: TransformerConfig
    deterministic: bool
    cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None, kind: LayerKind
    ) -> tuple[Array, LayerCache | None]:
        context = context.of_layer(kind)
        attention = Attention(self.config, name="attention")
        x_BTD, cache = self._add("attention", x_BTD, lambda x: attention(x, context, cache))
        if self.cross:
            cross, known = Attention(self.config, name="cross_attention"), cache
            x_BTD, cache = self._add("cross", x_BTD, lambda x: cross.cross(x, context, known))
        x_BTD, _ = self._add("mlp", x_BTD, lambda x: (self._mlp(x, context), None))
        return x_BTD, cache

    def _mlp(self, x_BTD: Array, context: Context) -> Array:
        if self.config.num_experts:
            experts = Experts(self.config, name="mlp")
            return experts(x_BTD, context.segment_ids_BT, context.platform)
        return MLP(self.config, name="mlp")(x_BTD, context.platform)

    def _add(self, name: str, x_BTD: Array, sublayer) -> tuple[Array, LayerCache | None]:
        """x + sublayer(norm(x)), or by norm_order; and what else the sublayer returns."""
        c = self.config
        norm = Norm(c, name=f"{name}_norm")
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if c.norm_order == "post":
            y_BTD, cache = sublayer(x_BTD)
            return norm(x_BTD + dropout(y_BTD)), cache
        y_BTD, cache = sublayer(norm(x_BTD))
        if c.norm_order == "sandwich":
            y_BTD = Norm(c, name=f"{name}_post_norm")(y_BTD)
        if c.depth_multiplier != 1:
            y_BTD = y_BTD / c.depth_multiplier
        return x_BTD + dropout(y_BTD), cache
