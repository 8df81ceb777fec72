"""The Transformer: decoder, encoder and encoder-decoder from the same Stack.

B batch, T length, S source length (of an encoder's input), D width, V vocabulary, C classes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.experts import ROUTER, summed
from gpt_jax.models.heads import MaskedLM, classify
from gpt_jax.models.layer_kinds import rotary_tables
from gpt_jax.models.layers import Context, LayerCache, Norm, param, weight_init
from gpt_jax.models.stack import Stack
from gpt_jax.ops import key_pages, positions, products, quantized
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array, Batch, Tree

# What `forward` passes on of a batch, where it is there.
_INPUTS = ("key_ranks", "query_ranks", "token_types",
           "encoder_tokens", "encoder_positions", "encoder_segment_ids")  # fmt: skip


@flax.struct.dataclass
class Cache:
    """A decoding cache.

    Attributes:
      layers: LayerCache of [L, B, K, S, H] leaves (scan) or a list of L (unrolled).
      index_B: Tokens each row holds: int32[B].
      memory_segments_BS: Segments of the encoder's input, 0 = padding; None without an encoder.
    """

    layers: Any
    index_B: Array
    memory_segments_BS: Array | None = None


class Transformer(nn.Module):
    """Token ids to the outputs of the config's head.

    Attributes:
      config: The architecture.
      platform: JAX's name of the platform that computes ("cpu", "gpu", "tpu"); None: the default
        backend's. It chooses dtypes of products and the attention's implementation.
      num_microbatches: Parts of a batch that go through the stages of a pipeline (models.pipeline).
    """

    config: TransformerConfig
    platform: str | None = None
    num_microbatches: int = 1

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        *,
        key_ranks: Array | None = None,
        query_ranks: Array | None = None,
        token_types: Array | None = None,
        encoder_tokens: Array | None = None,
        encoder_positions: Array | None = None,
        encoder_segment_ids: Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        features: bool = False,
    ) -> Any:
        """Outputs, f32: [B, T, V] of the heads "lm" and "mlm", [B, T, C] of "tokens", [B, C] of
        "sequence", [B, T, 2] of "span", [B, T, D] of "none"; with a cache (outputs, the cache with
        T more tokens).

        Args:
          tokens_BT: int32 ids.
          positions_BT: Position of each token in its document; None: 0, 1, ... after what the
            cache holds.
          segment_ids_BT: Documents of a packed row: tokens see their own document only, in the
            encoder's input too. None: one document.
          key_ranks, query_ranks: int32[B, T]; query i sees key j of its document if key_ranks[j]
            <= query_ranks[i]. They replace "causal" and "bidirectional".
          token_types: int32[B, T].
          encoder_tokens: int32[B, S], the input of an encoder_decoder's encoder. With a cache it is
            given in the first call and kept there.
          encoder_positions, encoder_segment_ids: As for the tokens.
          cache: From make_cache; its index says how many tokens each row holds already.
          deterministic: No dropout; otherwise the rng "dropout" is needed.
          features: The outputs before the head, in the compute dtype, whatever the head is.
        """
        c = self.config
        platform = self.platform or jax.default_backend()
        precision = products.precision(c.dtype, platform)
        embedding = self._token_embedding()
        if positions_BT is None:
            offset_B = cache.index_B if cache is not None else jnp.zeros(1, jnp.int32)
            positions_BT = offset_B[:, None] + jnp.arange(tokens_BT.shape[1])

        memory_BSD, memory_mask_BTS, memory_segments = None, None, None
        if c.family == "encoder_decoder":
            if encoder_tokens is not None:
                if encoder_segment_ids is None:
                    encoder_segment_ids = jnp.ones_like(encoder_tokens)
                memory_BSD = self._encode(
                    embedding, encoder_tokens, encoder_positions, encoder_segment_ids, platform,
                    deterministic,
                )  # fmt: skip
                memory_segments = encoder_segment_ids
            else:
                assert cache is not None, "an encoder_decoder needs encoder_tokens or a cache"
                memory_segments = cache.memory_segments_BS
            own = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
            memory_mask_BTS = own[:, :, None] == memory_segments[:, None, :]

        # As soon as the order is not that of the columns, distances go by positions.
        by_columns = cache is None and key_ranks is None
        context = Context(
            segment_ids_BT=segment_ids_BT,
            mask_BTT=_rank_mask(key_ranks, query_ranks, segment_ids_BT),
            rotary=rotary_tables(c, positions_BT, platform),
            bias_BNTS=self._bias("relative", positions_BT, cache, by_columns, c.family),
            cache_index_B=None if cache is None else cache.index_B,
            memory_BSD=memory_BSD,
            memory_mask_BTS=memory_mask_BTS,
            causal=c.family != "encoder",
            platform=platform,
        )
        x_BTD = self._embed(embedding, tokens_BT, positions_BT, token_types)
        x_BTD = self._enter(x_BTD, precision, deterministic)
        layer_caches = None if cache is None else cache.layers
        stack = Stack(
            c, deterministic, c.num_layers, c.family == "encoder_decoder", self.num_microbatches,
            name="stack",
        )  # fmt: skip
        x_BTD, layer_caches = stack(x_BTD, context, layer_caches)
        if c.norm_order != "post":
            x_BTD = Norm(c, name="final_norm")(x_BTD)
        outputs = x_BTD
        if not features:
            outputs = self._head(x_BTD, embedding, segment_ids_BT, precision, deterministic)
        if cache is None:
            return outputs
        return outputs, Cache(layer_caches, cache.index_B + tokens_BT.shape[1], memory_segments)

    def _token_embedding(self) -> Array:
        c = self.config
        init = nn.initializers.normal(_embedding_std(c))
        return param(self, "tokens", init, ("vocab", "embed"), (c.vocab_size, c.embed_dim))

    def _embed(
        self, embedding, tokens_BT, positions_BT, token_types_BT, table="positions"
    ) -> Array:
        """The sum of all embeddings, f32; `table` names that of learned positions."""
        c = self.config
        x_BTD = quantized.look_up(embedding, tokens_BT)
        if c.scale_embedding:
            # As Gemma, whose factor has the precision of the model: in bf16 sqrt(3072) is 55.5.
            x_BTD = x_BTD * jnp.asarray(c.embed_dim**0.5, c.dtype).astype(x_BTD.dtype)
        small = nn.initializers.normal(_embedding_std(c) / 2)
        if c.positions == "learned":
            shape, axes = (c.seq_len, c.embed_dim), ("positions", "embed")
            learned = param(self, table, small, axes, shape)
            x_BTD = x_BTD + jnp.take(learned, positions_BT, axis=0)
        elif c.positions == "sinusoidal":
            x_BTD = x_BTD + positions.sinusoids(positions_BT, c.embed_dim)
        if c.num_token_types and table == "positions":  # an encoder_decoder's encoder has none
            shape, axes = (c.num_token_types, c.embed_dim), ("types", "embed")
            types = param(self, "token_types", small, axes, shape)
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + jnp.take(types, types_BT, axis=0)
        return x_BTD

    def _enter(self, x_BTD, precision, deterministic, norm="embed_norm") -> Array:
        """From the embedding into the stack."""
        c = self.config
        # Each device computes its own rows; without this, parameters that are split over fsdp would
        # pull the whole batch to every device.
        x_BTD = constrain(x_BTD, "batch", "length", None)
        if c.embed_norm:
            x_BTD = Norm(c, name=norm)(x_BTD)
        x_BTD = products.to_compute(x_BTD, precision)
        return nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD)

    def _encode(
        self, embedding, tokens_BS, positions_BS, segment_ids_BS, platform, deterministic
    ) -> Array:
        """An encoder_decoder's encoder, [B, S, D]."""
        c = self.config
        if positions_BS is None:
            positions_BS = jnp.arange(tokens_BS.shape[1])[None]
        context = Context(
            segment_ids_BT=segment_ids_BS,
            mask_BTT=None,
            rotary=rotary_tables(c, positions_BS, platform),
            bias_BNTS=self._bias("encoder_relative", positions_BS, None, True, "encoder"),
            cache_index_B=None,
            memory_BSD=None,
            memory_mask_BTS=None,
            causal=False,
            platform=platform,
        )
        x_BSD = self._embed(embedding, tokens_BS, positions_BS, None, "encoder_positions")
        precision = products.precision(c.dtype, platform)
        x_BSD = self._enter(x_BSD, precision, deterministic, "encoder_embed_norm")
        stack = Stack(c, deterministic, c.num_encoder_layers, name="encoder")
        x_BSD, _ = stack(x_BSD, context, None)
        return Norm(c, name="encoder_norm")(x_BSD) if c.norm_order != "post" else x_BSD

    def _bias(self, name, positions_BT, cache: Cache | None, by_columns: bool, family: str):
        """T5's relative bias of a stack, f32[1 or B, N, T, S]; None with other positions."""
        c = self.config
        if c.positions != "relative":
            return None
        init = nn.initializers.normal(0.02 if c.init == "gpt2" else c.embed_dim**-0.5)
        shape, axes = (c.relative_buckets, c.num_heads), ("buckets", "heads")
        table = param(self, name, init, axes, shape)
        queries = keys = positions_BT
        if by_columns:
            # In a document positions rise with the columns, so that distances are those of columns.
            queries = keys = jnp.arange(positions_BT.shape[1])[None]
        if cache is not None:
            length = jax.tree.leaves(cache.layers)[0].shape[-2]
            keys = jnp.arange(length)[None]
        return positions.relative_bias(
            table, queries, keys, max_distance=c.relative_max_distance,
            bidirectional=family == "encoder",
        )  # fmt: skip

    def _head(self, x_BTD, embedding, segment_ids_BT, precision, deterministic) -> Array:
        c = self.config
        # Always f32: the loss and sampling are sensitive to the last digits of large logits.
        precision = dataclasses.replace(precision, output="float32")
        if c.head == "lm":
            return self._logits(x_BTD, embedding, precision).astype(jnp.float32)
        if c.head == "mlm":
            return MaskedLM(c, name="mlm")(x_BTD, embedding, precision)
        if c.head == "none":
            return x_BTD.astype(jnp.float32)
        return classify(c, x_BTD, segment_ids_BT, precision, deterministic)

    def _logits(self, x_BTD: Array, embedding: Array, precision: products.Precision) -> Array:
        c = self.config
        if c.scale_logits:
            x_BTD = x_BTD * c.embed_dim**-0.5
        if c.tied:
            logits = products.project(x_BTD, embedding, precision, output_first=True)
        else:
            init = weight_init(c, c.embed_dim, residual=True, hidden=False)
            head = param(self, "head", init, ("embed", "vocab"), (c.embed_dim, c.vocab_size))
            logits = products.project(x_BTD, head, precision)
        if c.width_multiplier != 1:
            # Not of the embedding or the head: so a tied one is right in both of its places.
            logits = logits / c.width_multiplier
        if c.logit_softcap:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


def _embedding_std(c: TransformerConfig) -> float:
    if c.scale_embedding:
        return c.embed_dim**-0.5
    # Where the embedding is the head too, it must begin small.
    is_head = (c.tied and c.head == "lm" and not c.scale_logits) or c.head == "mlm"
    return 0.02 if c.init == "gpt2" or is_head else 1.0


def _rank_mask(key_ranks, query_ranks, segment_ids_BT) -> Array | None:
    """Boolean [B, T, T], True = attend; None without ranks."""
    if key_ranks is None:
        return None
    mask = key_ranks[:, None, :] <= query_ranks[:, :, None]
    if segment_ids_BT is not None:
        mask &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return mask


def forward(
    model: Transformer, params: Tree, batch: Batch, dropout_key: Array | None = None, **how: Any
) -> Array:
    """The model's outputs of a batch; with dropout if a key is given."""
    return model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        **{name: batch[name] for name in _INPUTS if name in batch},
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        **how,
    )


def forward_training(
    model: Transformer, params: Tree, batch: Batch, dropout_key: Array | None = None
) -> tuple[Any, dict[str, Array]]:
    """`forward` as a training step needs it: with the sums of `experts.router_sums`, means over
    the layers; {} without experts."""
    if not model.config.num_experts:
        return forward(model, params, batch, dropout_key), {}
    outputs, variables = forward(model, params, batch, dropout_key, mutable=[ROUTER])
    return outputs, summed(variables, model.config.num_layers)


def init_params(model: Transformer, key: Array) -> Tree:
    """First parameters, in Flax's boxes that hold their logical axes."""
    token = jnp.zeros((1, 1), jnp.int32)
    source = token if model.config.family == "encoder_decoder" else None
    return model.init(key, token, encoder_tokens=source)["params"]


def make_cache(
    config: TransformerConfig, batch_size: int, length: int, dtype: Any, paged: bool = False
) -> Cache:
    """An empty cache for `length` tokens a row; `paged`: with keys as KeyPages."""
    shape = (batch_size, config.num_kv_heads, length, config.head_dim)

    # Arrays of their own for every k and v: shared ones could not be donated.
    def layer(shape: tuple[int, ...]) -> LayerCache:
        keys = key_pages.empty(shape, dtype) if paged else jnp.zeros(shape, dtype)
        return LayerCache(keys, jnp.zeros(shape, dtype))

    if config.scan:
        layers = layer((config.num_layers, *shape))
    else:
        layers = [layer(shape) for _ in range(config.num_layers)]
    return Cache(layers, jnp.zeros(batch_size, jnp.int32))
