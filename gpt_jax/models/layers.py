"""The parts of a Transformer block: functional Linen modules on `self.param` and one product.

B batch, T length, S cache length, D width, N query heads, K key/value heads, H head width, F MLP
width. Every parameter names its logical axes; parallel.sharding maps them to mesh axes.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.ops import attention, normalization, positions, products
from gpt_jax.types import Array


@flax.struct.dataclass
class Context:
    """What every layer of one forward pass shares.

    Attributes:
      segment_ids_BT: Documents of a packed row; None: one document.
      rotary: Tables of ops.positions for the tokens' positions; None with learned positions.
      cache_index_B: Where in the cache each row's first new token goes; None without a cache.
      platform: JAX's name of the platform the computation is for.
    """

    segment_ids_BT: Array | None
    rotary: tuple[Array, Array] | None
    cache_index_B: Array | None
    platform: str = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class LayerCache:
    """Keys and values of the tokens so far, [B, S, K, H] each, rotated already."""

    k_BSKH: Array
    v_BSKH: Array


def weight_init(config: TransformerConfig, fan_in: int, *, residual: bool = False):
    """Initializer of a matrix; `residual` marks the projections that write to the stream."""
    if config.init == "gpt2":
        return nn.initializers.normal(0.02 * ((2 * config.num_layers) ** -0.5 if residual else 1.0))
    return nn.initializers.zeros if residual else nn.initializers.normal(fan_in**-0.5)


def param(module: nn.Module, name: str, init, axes: tuple[str, ...], shape: tuple[int, ...]):
    """An f32 parameter that names its logical axes."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis."""

    config: TransformerConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array, rms: bool = False) -> Array:
        config, size = self.config, x.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, (self.axis,), (size,))
        if rms or config.norm == "rmsnorm":
            return normalization.rms_norm(x, scale, config.norm_eps)
        bias = None
        if config.bias:
            bias = param(self, "bias", nn.initializers.zeros, (self.axis,), (size,))
        return normalization.layer_norm(x, scale, bias, config.norm_eps)


class Dense(nn.Module):
    """y = x w + b, where the last `num_contract` dims of x meet the first dims of w."""

    config: TransformerConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    platform: str
    num_contract: int = 1
    residual: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = 1
        for size in self.shape[: self.num_contract]:
            fan_in *= size
        init = weight_init(self.config, fan_in, residual=self.residual)
        w = param(self, "kernel", init, self.axes, self.shape)
        precision = products.precision(self.config.dtype, self.platform)
        y = products.project(x, w, precision, self.num_contract)
        if self.config.bias:
            n = self.num_contract
            b = param(self, "bias", nn.initializers.zeros, self.axes[n:], self.shape[n:])
            y = y + b.astype(y.dtype)
        return y


class Attention(nn.Module):
    """Causal self-attention; grouped or multi-query by num_kv_heads."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        c, platform = self.config, context.platform
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        q_BTNH = Dense(c, (D, N, H), ("embed", "heads", "head_dim"), platform, name="q")(x_BTD)
        k_BTKH = Dense(c, (D, K, H), ("embed", "kv_heads", "head_dim"), platform, name="k")(x_BTD)
        v_BTKH = Dense(c, (D, K, H), ("embed", "kv_heads", "head_dim"), platform, name="v")(x_BTD)
        if c.qk_norm:
            q_BTNH = Norm(c, "head_dim", name="q_norm")(q_BTNH, rms=True)
            k_BTKH = Norm(c, "head_dim", name="k_norm")(k_BTKH, rms=True)
        if context.rotary is not None:
            q_BTNH = positions.rotate(q_BTNH, context.rotary)
            k_BTKH = positions.rotate(k_BTKH, context.rotary)
        if cache is None:
            keys, values, mask_BTS = k_BTKH, v_BTKH, None
        else:
            cache, mask_BTS = _extend(cache, k_BTKH, v_BTKH, context.cache_index_B)
            keys, values = cache.k_BSKH, cache.v_BSKH
        out_BTNH = attention.attention(
            q_BTNH,
            keys,
            values,
            precision=products.precision(c.dtype, platform),
            segment_ids_BT=None if cache is not None else context.segment_ids_BT,
            mask_BTS=mask_BTS,
            implementation=attention.implementation_for(c.attention, platform),
        )
        out = Dense(
            c, (N, H, D), ("heads", "head_dim", "embed"), platform, 2, residual=True, name="out"
        )
        return out(out_BTNH), cache


def _extend(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, index_B: Array):
    """Writes the new keys and values at each row's index; returns them and who sees whom."""
    write = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new, (i, 0, 0)))
    cache = LayerCache(
        write(cache.k_BSKH, k_BTKH.astype(cache.k_BSKH.dtype), index_B),
        write(cache.v_BSKH, v_BTKH.astype(cache.v_BSKH.dtype), index_B),
    )
    query_BT = index_B[:, None] + jnp.arange(k_BTKH.shape[1])
    mask_BTS = jnp.arange(cache.k_BSKH.shape[1]) <= query_BT[..., None]
    return cache, mask_BTS


class MLP(nn.Module):
    """down(activation(up x)), or down(silu(gate x) * up x) with SwiGLU."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, platform: str) -> Array:
        c = self.config
        D, F = c.embed_dim, c.mlp_dim
        h_BTF = Dense(c, (D, F), ("embed", "mlp"), platform, name="up")(x_BTD)
        if c.activation == "swiglu":
            gate = Dense(c, (D, F), ("embed", "mlp"), platform, name="gate")(x_BTD)
            h_BTF = nn.silu(gate) * h_BTF
        elif c.activation == "relu2":
            h_BTF = jnp.square(nn.relu(h_BTF))
        else:
            h_BTF = nn.gelu(h_BTF, approximate=True)
        down = Dense(c, (F, D), ("mlp", "embed"), platform, residual=True, name="down")
        return down(h_BTF)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        normed = Norm(c, name="attention_norm")(x_BTD)
        attended, cache = Attention(c, name="attention")(normed, context, cache)
        x_BTD = x_BTD + dropout(attended)
        mixed = MLP(c, name="mlp")(Norm(c, name="mlp_norm")(x_BTD), context.platform)
        return x_BTD + dropout(mixed), cache
