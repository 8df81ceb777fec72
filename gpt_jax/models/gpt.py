"""The decoder-only GPT.  B batch, T length, D width, V vocabulary, S cache length."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.layers import Context, LayerCache, Norm, param, weight_init
from gpt_jax.models.stack import Stack
from gpt_jax.ops import positions, products
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array, Batch, Tree


@flax.struct.dataclass
class Cache:
    """A decoding cache.

    Attributes:
      layers: LayerCache of [L, B, S, K, H] leaves (scan) or a list of L (unrolled).
      index_B: Tokens each row holds: int32[B].
    """

    layers: Any
    index_B: Array


class GPT(nn.Module):
    """Token ids to logits.

    Attributes:
      config: The architecture.
      platform: JAX's name of the platform that computes ("cpu", "gpu", "tpu"); None: the default
        backend's. It chooses dtypes of products and the attention's implementation.
    """

    config: TransformerConfig
    platform: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Logits, f32[B, T, V]; with a cache (logits, the cache with T more tokens).

        Args:
          tokens_BT: int32 ids.
          positions_BT: Position of each token in its document; None: 0, 1, ... after what the
            cache holds.
          segment_ids_BT: Documents of a packed row: tokens see their own document only.
          cache: From make_cache; its index says how many tokens each row holds already.
          deterministic: No dropout; otherwise the rng "dropout" is needed.
        """
        c = self.config
        platform = self.platform or jax.default_backend()
        precision = products.precision(c.dtype, platform)
        if positions_BT is None:
            offset_B = cache.index_B if cache is not None else jnp.zeros(1, jnp.int32)
            positions_BT = offset_B[:, None] + jnp.arange(tokens_BT.shape[1])
        rotary = None
        if c.positions == "rotary":
            rotary = positions.rotary_tables(positions_BT, c.head_dim, c.rope_theta)
        context = Context(
            segment_ids_BT, rotary, None if cache is None else cache.index_B, platform
        )

        x_BTD, embedding = self._embed(tokens_BT, positions_BT)
        # Each device computes its own rows; without this, parameters that are split over fsdp would
        # pull the whole batch to every device.
        x_BTD = constrain(products.to_compute(x_BTD, precision), "batch", "length", None)
        x_BTD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD)
        layer_caches = None if cache is None else cache.layers
        x_BTD, layer_caches = Stack(c, deterministic, name="stack")(x_BTD, context, layer_caches)
        x_BTD = Norm(c, name="final_norm")(x_BTD)
        logits_BTV = self._logits(x_BTD, embedding, precision)
        if cache is None:
            return logits_BTV
        return logits_BTV, Cache(layer_caches, cache.index_B + tokens_BT.shape[1])

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> tuple[Array, Array]:
        c = self.config
        std = 0.02 if c.init == "gpt2" or c.tied else 1.0
        shape, axes = (c.vocab_size, c.embed_dim), ("vocab", "embed")
        embedding = param(self, "tokens", nn.initializers.normal(std), axes, shape)
        x_BTD = jnp.take(embedding, tokens_BT, axis=0)
        if c.positions == "learned":
            shape, axes = (c.seq_len, c.embed_dim), ("length", "embed")
            table = param(self, "positions", nn.initializers.normal(std / 2), axes, shape)
            x_BTD = x_BTD + jnp.take(table, positions_BT, axis=0)
        return x_BTD, embedding

    def _logits(self, x_BTD: Array, embedding: Array, precision: products.Precision) -> Array:
        c = self.config
        if c.tied:
            logits = products.project(x_BTD, embedding, precision, output_first=True)
        else:
            init = weight_init(c, c.embed_dim, residual=True)
            head = param(self, "head", init, ("embed", "vocab"), (c.embed_dim, c.vocab_size))
            logits = products.project(x_BTD, head, precision)
        # Always f32: the loss and sampling are sensitive to the last digits of large logits.
        precision = dataclasses.replace(precision, output="float32")
        logits = logits.astype(jnp.float32)
        if c.logit_softcap:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


def forward(model: GPT, params: Tree, batch: Batch, dropout_key: Array | None = None) -> Array:
    """Logits, f32[B, T, V], of a batch; with dropout if a key is given."""
    return model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )


def make_cache(config: TransformerConfig, batch_size: int, length: int, dtype: Any) -> Cache:
    """An empty cache for `length` tokens a row."""
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)

    # Arrays of their own for every k and v: shared ones could not be donated.
    def layer(shape: tuple[int, ...]) -> LayerCache:
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    if config.scan:
        layers = layer((config.num_layers, *shape))
    else:
        layers = [layer(shape) for _ in range(config.num_layers)]
    return Cache(layers, jnp.zeros(batch_size, jnp.int32))
