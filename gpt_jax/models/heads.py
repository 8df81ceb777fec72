"""Heads beside the next token: masked tokens, and classes of rows, tokens and spans.

B batch, T length, D width, V vocabulary, C classes.
"""

import flax.linen as nn
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.layers import Norm, param, weight_init
from gpt_jax.ops import products
from gpt_jax.types import Array


class MaskedLM(nn.Module):
    """BERT's head (arXiv:1810.04805): dense, GELU, norm, the tied embedding, a bias."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, embedding: Array, precision: products.Precision) -> Array:
        """Logits, f32[B, T, V]."""
        c = self.config
        h_BTD = HeadDense(c, c.embed_dim, name="dense")(x_BTD, precision)
        h_BTD = nn.gelu(h_BTD, approximate=c.activation != "gelu_exact")
        h_BTD = Norm(c, name="norm")(h_BTD)
        logits = products.project(h_BTD, embedding, precision, output_first=True)
        if c.width_multiplier != 1:
            logits = logits / c.width_multiplier
        return logits + param(self, "bias", nn.initializers.zeros, ("vocab",), (c.vocab_size,))


class HeadDense(nn.Module):
    """y = x w + b in f32; a `final` one writes the logits."""

    config: TransformerConfig
    size: int
    final: bool = False

    @nn.compact
    def __call__(self, x: Array, precision: products.Precision) -> Array:
        c, width = self.config, x.shape[-1]
        axis = "classes" if self.final else None
        init = weight_init(c, width, residual=self.final, hidden=not self.final)
        w = param(self, "kernel", init, ("embed", axis), (width, self.size))
        y = products.project(x, w, precision)
        if self.final and c.width_multiplier != 1:
            y = y / c.width_multiplier
        if c.bias and (c.classifier_bias or not self.final):
            y = y + param(self, "bias", nn.initializers.zeros, (axis,), (self.size,))
        return y.astype(jnp.float32)


def classify(
    config: TransformerConfig,
    x_BTD: Array,
    segment_ids_BT: Array | None,
    precision: products.Precision,
    deterministic: bool,
) -> Array:
    """[B, C] of the head "sequence", [B, T, C] of "tokens", [B, T, 2] of "span"; f32.

    To be called inside a module, which then holds `pooler` and `classifier`.
    """
    c = config
    if c.head == "sequence":
        x_BTD = _pool(x_BTD, segment_ids_BT, c.pool)
        if c.pool == "pooler":
            x_BTD = jnp.tanh(HeadDense(c, c.embed_dim, name="pooler")(x_BTD, precision))
    x_BTD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD)
    classes = 2 if c.head == "span" else c.num_classes
    return HeadDense(c, classes, final=True, name="classifier")(x_BTD, precision)


def _pool(x_BTD: Array, segment_ids_BT: Array | None, how: str) -> Array:
    """[B, D]: one vector a row, padding left out."""
    if how in ("first", "pooler"):
        return x_BTD[:, 0]
    B, T = x_BTD.shape[:2]
    real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT > 0
    if how == "mean":
        total_BD = jnp.where(real_BT[..., None], x_BTD.astype(jnp.float32), 0).sum(1)
        return total_BD / jnp.maximum(real_BT.sum(1), 1)[:, None]
    last_B = jnp.maximum(real_BT.sum(1) - 1, 0)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
