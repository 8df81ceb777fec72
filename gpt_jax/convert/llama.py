"""Llama's import table; also for what is shaped like it: Mistral without a window, SmolLM2.

Queries and keys stay as they are: Hugging Face rotates halves, as ops/positions does.
"""

from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.table import Entry, Family, Rule, linear, vector

_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# What transformers takes where the file says nothing.
_MISTRAL_WINDOW = 4096


def _values(config: HFConfig) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        config.need(name, False)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    length = config.size("max_position_embeddings", 2048)
    _check_window(config, length)
    return {
        "family": "decoder", "head": "lm", "num_classes": 0,
        "vocab_size": config.size("vocab_size"), "seq_len": length,
        "num_layers": config.size("num_hidden_layers"), "embed_dim": width, "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads),
        "head_dim": config.size("head_dim", width // heads),
        "mlp_dim": config.size("intermediate_size"),
        "positions": "rotary", "rope_theta": _rope_theta(config), "norm": "rmsnorm",
        "norm_order": "pre", "norm_eps": config.number("rms_norm_eps", 1e-6),
        "embed_norm": False, "num_token_types": 0,
        "activation": config.choice("hidden_act", _ACTIVATIONS, "silu"),
        "bias": False, "qk_norm": False, "scale_embedding": False, "scale_logits": False,
        "scale_attention": True, "init": "gpt2",
    }  # fmt: skip


def _rope_theta(config: HFConfig) -> float:
    # transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling, both in one place each.
    config.need("partial_rotary_factor", 1.0)
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.unsupported(name, rope, "only the rope_type 'default'")
    theta = config.get("rope_parameters", {}).get("rope_theta")
    return float(theta) if theta is not None else config.number("rope_theta", 10_000.0)


def _check_window(config: HFConfig, length: int) -> None:
    window = config.values.get("sliding_window")
    if config.model_type == "mistral" and "sliding_window" not in config.values:
        window = _MISTRAL_WINDOW
    # A window as long as the longest sequence hides nothing.
    if window is not None and window < length and config.get("use_sliding_window", True):
        raise config.unsupported(
            "sliding_window", window, f"only null or at least max_position_embeddings {length}"
        )


def _layer(theirs: str, ours: str, rule: Rule) -> Entry:
    return Entry(f"layers.{{i}}.{theirs}.weight", f"stack/layers/{ours}", rule, "num_layers")


D, F = ("embed_dim",), ("mlp_dim",)
HEADS, KV_HEADS = ("num_heads", "head_dim"), ("num_kv_heads", "head_dim")

LLAMA = Family(
    values=_values,
    table=(
        Entry("embed_tokens.weight", "tokens", Rule(("vocab_size",), D)),
        _layer("input_layernorm", "attention_norm/scale", vector("embed_dim")),
        _layer("self_attn.q_proj", "attention/q/kernel", linear(D, HEADS)),
        _layer("self_attn.k_proj", "attention/k/kernel", linear(D, KV_HEADS)),
        _layer("self_attn.v_proj", "attention/v/kernel", linear(D, KV_HEADS)),
        _layer("self_attn.o_proj", "attention/out/kernel", linear(HEADS, D)),
        _layer("post_attention_layernorm", "mlp_norm/scale", vector("embed_dim")),
        _layer("mlp.gate_proj", "mlp/gate/kernel", linear(D, F)),
        _layer("mlp.up_proj", "mlp/up/kernel", linear(D, F)),
        _layer("mlp.down_proj", "mlp/down/kernel", linear(F, D)),
        Entry("norm.weight", "final_norm/scale", vector("embed_dim")),
        Entry("lm_head.weight", "head", linear(D, ("vocab_size",)), group="head"),
    ),
    prefix="model.",
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    copies={"lm_head.weight": "embed_tokens.weight"},
    head="lm_head.weight",
    tied=False,
)
