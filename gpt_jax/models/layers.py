"""The parts of a Transformer block: functional Linen modules on `self.param` and one product.

B batch, T length, S cache length, D width, N query heads, K key/value heads, H head width, F MLP
width. Every parameter names its logical axes; parallel.sharding maps them to mesh axes.
"""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.layer_kinds import LayerKind, of_layer
from gpt_jax.ops import attention, key_pages, normalization, positions, products
from gpt_jax.ops.key_pages import KeyPages
from gpt_jax.ops.quantized import Quantized
from gpt_jax.types import Array


@flax.struct.dataclass
class Context:
    """What every layer of one stack's forward pass shares.

    Attributes:
      segment_ids_BT: Documents of a packed row; None: one document.
      mask_BTT: Who sees whom, True = attend; None: by `causal` and segment_ids_BT.
      rotary: Tables of layer_kinds for the tokens' positions; None without rotary positions.
      bias_BNTS: Relative bias of the self-attention; None: none.
      cache_index_B: Where in the cache each row's first new token goes; None without a cache.
      memory_BSD: The encoder's outputs; None in a stack without cross attention, and where the
        cache holds their keys and values.
      memory_mask_BTS: Which of them each token sees.
      causal: Whether a token sees those before it only.
      platform: JAX's name of the platform the computation is for.
      window: int32[]; this layer's tokens see so many, themselves included; None: all.
    """

    segment_ids_BT: Array | None
    mask_BTT: Array | None
    rotary: tuple[Array, Array] | None
    bias_BNTS: Array | None
    cache_index_B: Array | None
    memory_BSD: Array | None
    memory_mask_BTS: Array | None
    causal: bool = flax.struct.field(pytree_node=False)
    platform: str = flax.struct.field(pytree_node=False)
    window: Array | None = None

    def of_layer(self, kind: LayerKind) -> "Context":
        """The context of one layer."""
        return self.replace(window=kind.window, rotary=of_layer(self.rotary, kind))


@flax.struct.dataclass
class LayerCache:
    """Keys and values, [B, K, S, H] each (keys perhaps in pages): of the tokens so far, rotated
    already, and of the encoder's outputs (None before the first pass, and without an encoder)."""

    k_BKSH: Array | KeyPages
    v_BKSH: Array
    memory_k_BKSH: Array | None = None
    memory_v_BKSH: Array | None = None


def weight_init(
    config: TransformerConfig, fan_in: int, *, residual: bool = False, hidden: bool = True
):
    """Initializer of a matrix; `residual` marks the projections that write to the stream.

    `hidden` marks those whose both sides grow with the width, not a head: muP draws them smaller.
    """
    if config.init == "gpt2":
        layers = config.mup_base_layers or config.num_layers
        std = 0.02 * ((2 * layers) ** -0.5 if residual else 1.0)
        return nn.initializers.normal(std * config.width_multiplier**-0.5 if hidden else std)
    # 1 / fan_in is that of the base width over the width's multiplier already.
    return nn.initializers.zeros if residual else nn.initializers.normal(fan_in**-0.5)


def param(module: nn.Module, name: str, init, axes: tuple[str, ...], shape: tuple[int, ...]):
    """An f32 parameter that names its logical axes; or what stands in its place as 8 bits."""
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Quantized):  # Flax would compare its parts with the f32 one
            return given
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis; `rms` makes the former the latter."""

    config: TransformerConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array, rms: bool = False) -> Array:
        config, size = self.config, x.shape[-1]
        plus_one = config.norm == "rmsnorm_plus_one"
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = param(self, "scale", init, (self.axis,), (size,))
        if plus_one:
            return normalization.rms_norm(x, 1.0 + scale, config.norm_eps)
        if rms or config.norm == "rmsnorm":
            return normalization.rms_norm(x, scale, config.norm_eps)
        bias = None
        if config.bias:
            bias = param(self, "bias", nn.initializers.zeros, (self.axis,), (size,))
        return normalization.layer_norm(x, scale, bias, config.norm_eps)


class Dense(nn.Module):
    """y = x w + b, where the last `num_contract` dims of x meet the first dims of w.

    Where one of config.lora_targets occurs in the module's path, an adapter is added:
    alpha / R * (x a) b (arXiv:2106.09685), which begins as zero.
    """

    config: TransformerConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_contract: int = 1
    residual: bool = False
    fan_in_factor: int = 1
    bias: bool = False  # even without config.bias

    @nn.compact
    def __call__(self, x: Array, platform: str) -> Array:
        c, n = self.config, self.num_contract
        fan_in = math.prod(self.shape[:n]) * self.fan_in_factor
        init = weight_init(c, fan_in, residual=self.residual)
        w = param(self, "kernel", init, self.axes, self.shape)
        precision = products.precision(c.dtype, platform)
        y = products.project(x, w, precision, n)
        if c.bias or self.bias:
            b = param(self, "bias", nn.initializers.zeros, self.axes[n:], self.shape[n:])
            y = products.add_bias(y, b, precision)
        if c.lora_rank and c.has_adapter("/".join(self.path)):
            y = y + self._low_rank(x, precision).astype(y.dtype)
        return y

    def _low_rank(self, x: Array, precision: products.Precision) -> Array:
        c, n = self.config, self.num_contract
        ins, outs, rank = self.shape[:n], self.shape[n:], c.lora_rank
        init = nn.initializers.normal(math.prod(ins) ** -0.5)
        a = param(self, "lora_a", init, (*self.axes[:n], "rank"), (*ins, rank))
        b = param(self, "lora_b", nn.initializers.zeros, ("rank", *self.axes[n:]), (rank, *outs))
        low = products.project(x, a, precision, n)
        return c.lora_alpha / rank * products.project(low, b, precision)


class Attention(nn.Module):
    """Self-attention, or with a memory cross attention; grouped or multi-query by num_kv_heads."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        # Without the division by sqrt(H) the queries start out that much smaller.
        shrink = 1 if c.scale_attention else H
        query, key = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Dense(c, (D, N, H), query, fan_in_factor=shrink, bias=c.qkv_bias)
        self.k = Dense(c, (D, K, H), key, bias=c.qkv_bias)
        self.v = Dense(c, (D, K, H), key, bias=c.qkv_bias)
        self.out = Dense(c, (N, H, D), ("heads", "head_dim", "embed"), 2, residual=True)
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c, "head_dim"), Norm(c, "head_dim")

    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        """Self-attention."""
        q_BTNH = self._queries(x_BTD, context)
        keys, values = self._keys_values(x_BTD, context)
        if context.rotary is not None:
            q_BTNH = positions.rotate(q_BTNH, context.rotary)
            keys = positions.rotate(keys, context.rotary)
        mask, window = context.mask_BTT, context.window
        if cache is not None:
            cache, mask = _extend(cache, keys, values, context)
        if mask is not None and window is not None:
            first_B = jnp.zeros(1, jnp.int32) if cache is None else context.cache_index_B
            mask &= _in_window(first_B, mask.shape, window)
            window = None
        if cache is not None:
            out_BTNH = attention.attend_cached(
                q_BTNH, cache.k_BKSH, cache.v_BKSH, mask, bias_BNTS=context.bias_BNTS,
                **self._how(context),
            )  # fmt: skip
        else:
            out_BTNH = self._attend(
                q_BTNH, keys, values, context, causal=context.causal, mask_BTS=mask,
                segment_ids_BT=context.segment_ids_BT, bias_BNTS=context.bias_BNTS, window=window,
            )  # fmt: skip
        return self.out(out_BTNH, context.platform), cache

    def cross(
        self, x_BTD: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        """Attention to the encoder's outputs, or to what the cache holds of them."""
        q_BTNH, mask_BTS = self._queries(x_BTD, context), context.memory_mask_BTS
        if context.memory_BSD is not None:
            keys, values = self._keys_values(context.memory_BSD, context)
            if cache is None:
                out_BTNH = self._attend(
                    q_BTNH, keys, values, context, causal=False, mask_BTS=mask_BTS
                )
                return self.out(out_BTNH, context.platform), None
            keys, values = attention.heads_first(keys), attention.heads_first(values)
            cache = cache.replace(memory_k_BKSH=keys, memory_v_BKSH=values)
        out_BTNH = attention.attend_cached(
            q_BTNH, cache.memory_k_BKSH, cache.memory_v_BKSH, mask_BTS, **self._how(context)
        )
        return self.out(out_BTNH, context.platform), cache

    def _queries(self, x_BTD: Array, context: Context) -> Array:
        q_BTNH = self.q(x_BTD, context.platform)
        return self.q_norm(q_BTNH, rms=True) if self.config.qk_norm else q_BTNH

    def _keys_values(self, x_BSD: Array, context: Context) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = (dense(x_BSD, context.platform) for dense in (self.k, self.v))
        return (self.k_norm(k_BSKH, rms=True) if self.config.qk_norm else k_BSKH), v_BSKH

    def _attend(
        self, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, context: Context, **how
    ) -> Array:
        name = attention.implementation_for(self.config.attention, context.platform)
        return attention.attention(
            q_BTNH, k_BSKH, v_BSKH, implementation=name, **self._how(context), **how
        )

    def _how(self, context: Context) -> dict:
        """What all attention of the model shares."""
        c = self.config
        return {
            "precision": products.precision(c.dtype, context.platform),
            "scale": c.score_scale,
            "softcap": c.attention_softcap,
        }


def _extend(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, context: Context):
    """Writes the new keys and values at each row's index; returns them and who sees whom."""
    index_B = context.cache_index_B

    def write(old_BKSH: Array, new_BTKH: Array) -> Array:
        new_BKTH = attention.heads_first(new_BTKH).astype(old_BKSH.dtype)
        # One head of a row after another, in place. Where there is one index only, XLA:CPU makes
        # of it what copies the cache four times: hence heads too, of which there is seldom one.
        index_BK = jnp.broadcast_to(index_B[:, None], old_BKSH.shape[:2])
        head = jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice(old, new, (i, 0)))
        return jax.vmap(head)(old_BKSH, new_BKTH, index_BK)

    if isinstance(cache.k_BKSH, KeyPages):
        keys = key_pages.write(cache.k_BKSH, attention.heads_first(k_BTKH), index_B)
    else:
        keys = write(cache.k_BKSH, k_BTKH)
    cache = cache.replace(k_BKSH=keys, v_BKSH=write(cache.v_BKSH, v_BTKH))
    num_places = cache.v_BKSH.shape[2]
    if context.mask_BTT is not None:
        # A prompt that is read by other rules than left to right fills an empty cache.
        missing = num_places - context.mask_BTT.shape[2]
        return cache, jnp.pad(context.mask_BTT, ((0, 0), (0, 0), (0, missing)))
    query_BT = index_B[:, None] + jnp.arange(k_BTKH.shape[1])
    mask_BTS = jnp.arange(num_places) <= query_BT[..., None]
    return cache, mask_BTS


def _in_window(first_B: Array, shape: tuple[int, ...], window: Array) -> Array:
    """Boolean [B or 1, T, S]: keys less than `window` columns before the query's.

    Args:
      first_B: Column of each row's first query.
      shape: (B, T, S) of a mask.
      window: int32[].
    """
    query_BT = first_B[:, None] + jnp.arange(shape[1])
    return query_BT[..., None] - jnp.arange(shape[2]) < window


_ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}
_GATES = {"swiglu": nn.silu, "geglu": functools.partial(nn.gelu, approximate=True)}


def is_gated(config: TransformerConfig) -> bool:
    """Whether an MLP has a product `gate`."""
    return config.activation in _GATES


def activate(config: TransformerConfig, up: Array, gate: Array | None) -> Array:
    """What goes into the product `down`."""
    if gate is not None:
        return _GATES[config.activation](gate) * up
    return _ACTIVATIONS[config.activation](up)


class MLP(nn.Module):
    """down(activation(up x)), or with a gated activation down(activation(gate x) * up x)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, platform: str) -> Array:
        c = self.config
        D, F = c.embed_dim, c.mlp_dim
        h_BTF = Dense(c, (D, F), ("embed", "mlp"), name="up")(x_BTD, platform)
        gate = None
        if is_gated(c):
            gate = Dense(c, (D, F), ("embed", "mlp"), name="gate")(x_BTD, platform)
        h_BTF = activate(c, h_BTF, gate)
        return Dense(c, (F, D), ("mlp", "embed"), residual=True, name="down")(h_BTF, platform)
