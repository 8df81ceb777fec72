"""T5's table (arXiv:1910.10683), v1.0 and v1.1; mT5 is shaped as v1.1."""

import dataclasses
from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.table import Entry, Family, Rule, linear, vector
from gpt_jax.models.config import TransformerConfig

# "gated-gelu" is the tanh form, "gelu" is not.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}
_TO_ACTIVATIONS = {
    "relu": "relu",
    "gelu_exact": "gelu",
    "gelu": "gelu_new",
    "geglu": "gated-gelu",
    "swiglu": "gated-silu",
}
# T5 has no longest sequence; it was trained on this length.
_LENGTH = 512


def _values(config: HFConfig) -> dict[str, Any]:
    heads, num_layers = config.size("num_heads"), config.size("num_layers")
    # transformers 5 writes scale_decoder_outputs; before it, an untied head meant no scaling.
    scale = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return {
        "family": "encoder_decoder", "head": "lm", "num_classes": 0,
        "vocab_size": config.size("vocab_size"), "seq_len": config.size("n_positions", _LENGTH),
        "num_layers": config.size("num_decoder_layers", num_layers),
        "num_encoder_layers": num_layers, "embed_dim": config.size("d_model"),
        "num_heads": heads, "num_kv_heads": heads, "head_dim": config.size("d_kv"),
        "mlp_dim": config.size("d_ff"), "positions": "relative",
        "relative_buckets": config.size("relative_attention_num_buckets", 32),
        "relative_max_distance": config.size("relative_attention_max_distance", 128),
        "norm": "rmsnorm", "norm_order": "pre", "embed_norm": False, "num_token_types": 0,
        "norm_eps": config.number("layer_norm_epsilon", 1e-6),
        "activation": config.choice("feed_forward_proj", _ACTIVATIONS, "relu"),
        "bias": False, "qk_norm": False, "scale_embedding": False, "scale_logits": scale,
        "scale_attention": False, "init": "fan_in",
        "start_id": config.get("decoder_start_token_id", config.get("pad_token_id", 0)),
    }  # fmt: skip


def _to_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size, "n_positions": config.seq_len,
        "num_layers": config.num_encoder_layers, "num_decoder_layers": config.num_layers,
        "d_model": config.embed_dim, "num_heads": config.num_heads, "d_kv": config.head_dim,
        "d_ff": config.mlp_dim, "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps, "dropout_rate": config.dropout,
        "feed_forward_proj": _TO_ACTIVATIONS.get(config.activation, "relu"),
        # transformers 4 scales if the head is tied, and reads no other word for it.
        "scale_decoder_outputs": config.tied, "decoder_start_token_id": config.start_id,
    }  # fmt: skip


D, F, HEADS = ("embed_dim",), ("mlp_dim",), ("num_heads", "head_dim")


def _attention(theirs: str, ours: str, layers: str) -> tuple[Entry, ...]:
    return tuple(
        Entry(f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", linear(D, HEADS), layers)
        for name in ("q", "k", "v")
    ) + (Entry(f"{theirs}.o.weight", f"{ours}/out/kernel", linear(HEADS, D), layers),)


def _norm(theirs: str, ours: str, layers: str = "") -> Entry:
    return Entry(f"{theirs}.weight", f"{ours}/scale", vector("embed_dim"), layers)


def _stack(theirs: str, ours: str, layers: str, mlp: int, relative: str, norm: str):
    """Entries of a stack whose sublayer number `mlp` is the MLP, the last one."""
    block, layer = f"{theirs}.block.{{i}}.layer", f"{ours}/layers"
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    dense = f"{block}.{mlp}.DenseReluDense"
    gated, plain = {"layers": layers, "group": "gated"}, {"layers": layers, "group": "plain"}
    return (
        Entry(bias, relative, Rule(("relative_buckets",), ("num_heads",))),
        _norm(f"{block}.0.layer_norm", f"{layer}/attention_norm", layers),
        *_attention(f"{block}.0.SelfAttention", f"{layer}/attention", layers),
        _norm(f"{block}.{mlp}.layer_norm", f"{layer}/mlp_norm", layers),
        Entry(f"{dense}.wi.weight", f"{layer}/mlp/up/kernel", linear(D, F), **plain),
        Entry(f"{dense}.wi_0.weight", f"{layer}/mlp/gate/kernel", linear(D, F), **gated),
        Entry(f"{dense}.wi_1.weight", f"{layer}/mlp/up/kernel", linear(D, F), **gated),
        Entry(f"{dense}.wo.weight", f"{layer}/mlp/down/kernel", linear(F, D), layers),
        _norm(f"{theirs}.final_layer_norm", norm),
    )


_CROSS = "decoder.block.{i}.layer.1"

T5 = Family(
    values=_values,
    table=(
        Entry("shared.weight", "tokens", Rule(("vocab_size",), D)),
        *_stack("encoder", "encoder", "num_encoder_layers", 1, "encoder_relative", "encoder_norm"),
        *_stack("decoder", "stack", "num_layers", 2, "relative", "final_norm"),
        _norm(f"{_CROSS}.layer_norm", "stack/layers/cross_norm", "num_layers"),
        *_attention(f"{_CROSS}.EncDecAttention", "stack/layers/cross_attention", "num_layers"),
        Entry("lm_head.weight", "head", linear(D, ("vocab_size",)), group="head"),
    ),
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    head="lm_head.weight",
    # transformers 5 writes tie_word_embeddings: true for v1.1 too, whose head is its own.
    tied=None,
    to_config=_to_config,
)


def _encoder_values(config: HFConfig) -> dict[str, Any]:
    values = {**_values(config), "family": "encoder", "head": "none", "scale_logits": False}
    return values | {"num_layers": values.pop("num_encoder_layers"), "start_id": -1}


def _to_encoder_config(config: TransformerConfig) -> dict[str, Any]:
    own = {"num_layers": config.num_layers, "architectures": ["T5EncoderModel"]}
    # Whether outputs are scaled is not read.
    return _to_config(config) | own | {"is_encoder_decoder": False, "decoder_start_token_id": 0}


# T5EncoderModel: the encoder alone, as a model of one stack.
T5_ENCODER = dataclasses.replace(
    T5,
    values=_encoder_values,
    to_config=_to_encoder_config,
    table=(
        T5.table[0],
        *_stack("encoder", "stack", "num_layers", 1, "relative", "final_norm"),
    ),
)
