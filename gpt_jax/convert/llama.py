"""Tables of Llama and of what is shaped like it: Mistral, Qwen2, Qwen3, SmolLM2, SmolLM3.

Queries and keys stay as they are: Hugging Face rotates halves, as ops/positions does.
"""

import dataclasses
from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.hf_layers import (
    SLIDING,
    layer_types,
    rope_config,
    rope_values,
    sliding_layers,
    window_values,
)
from gpt_jax.convert.table import Entry, Family, Rule, linear, vector
from gpt_jax.models.config import TransformerConfig

_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# What transformers takes where the file says nothing.
_MISTRAL_WINDOW, _QWEN_WINDOW, _QWEN_FULL_LAYERS, _QWEN3_HEAD_DIM = 4096, 4096, 28, 128
_LLAMA_LENGTH, _NO_ROPE_INTERVAL, _SMOLLM3_THETA = 2048, 4, 2e6


def head_values(config: HFConfig, bare: str = "none") -> dict[str, Any]:
    """The head of a decoder, by the name of its class; `bare`: that of a class without a head."""
    values = {"head": "lm", "num_classes": 0, "pool": "last", "classifier_bias": False}
    if config.architecture.endswith("ForSequenceClassification"):
        return values | {"head": "sequence", "num_classes": config.num_labels()}
    return values | ({"head": bare} if config.architecture.endswith("Model") else {})


def decoder_values(config: HFConfig, length: int | None = None) -> dict[str, Any]:
    """Fields of a decoder of Llama's shape but for those of its rotary positions.

    Args:
      config: The config.
      length: Its longest sequence, where it does not say.
    """
    for name in ("attention_bias", "mlp_bias"):
        config.need(name, False)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    return {
        "family": "decoder", **head_values(config),
        "vocab_size": config.size("vocab_size"),
        "seq_len": config.size("max_position_embeddings", length),
        "num_layers": config.size("num_hidden_layers"), "embed_dim": width, "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads),
        "head_dim": config.size("head_dim", width // heads),
        "mlp_dim": config.size("intermediate_size"),
        "positions": "rotary", "unrotated_layers": (), "window": 0, "global_layers": (),
        "norm": "rmsnorm", "norm_order": "pre", "norm_eps": config.number("rms_norm_eps", 1e-6),
        "embed_norm": False, "num_token_types": 0,
        "bias": False, "qkv_bias": False, "qk_norm": False, "scale_embedding": False,
        "scale_logits": False, "scale_attention": True, "score_width": 0,
        "attention_softcap": 0.0, "logit_softcap": 0.0, "init": "gpt2",
    }  # fmt: skip


def _shared(config: HFConfig, length: int | None = None, theta: float = 1e4) -> dict[str, Any]:
    activation = config.choice("hidden_act", _ACTIVATIONS, "silu")
    values = {**decoder_values(config, length), **rope_values(config, theta)}
    return values | {"activation": activation}


def _llama(config: HFConfig) -> dict[str, Any]:
    values = _shared(config, _LLAMA_LENGTH)
    # transformers reads no window in a Llama; one as long as the longest sequence hides nothing.
    window, length = config.get("sliding_window"), values["seq_len"]
    if window is not None and window < length and config.get("use_sliding_window", True):
        raise config.unsupported(
            "sliding_window", window, f"only null or at least max_position_embeddings {length}"
        )
    return values


def _mistral(config: HFConfig) -> dict[str, Any]:
    values = _shared(config)
    sliding = sliding_layers(config, values["num_layers"], lambda i: True)
    if not all(sliding):  # which transformers does not read either
        raise config.unsupported("layer_types", config.get("layer_types"), "only one type")
    window = config.optional("sliding_window", _MISTRAL_WINDOW)
    return values | window_values(window, sliding)


def _windowed(config: HFConfig, values: dict[str, Any], by_rule) -> dict[str, Any]:
    """With the window that `use_sliding_window` allows."""
    default = _QWEN_WINDOW if config.model_type.startswith("qwen") else None
    window = config.optional("sliding_window", default)
    if not config.get("use_sliding_window", False):
        window = None
    return values | window_values(window, sliding_layers(config, values["num_layers"], by_rule))


def _qwen2(config: HFConfig) -> dict[str, Any]:
    full = config.optional("max_window_layers", _QWEN_FULL_LAYERS) or 0
    return _windowed(config, _shared(config) | {"qkv_bias": True}, lambda i: i >= full)


def _qwen3(config: HFConfig) -> dict[str, Any]:
    values = {**_qwen2(config), "qkv_bias": False, "qk_norm": True}
    return values | {"head_dim": config.size("head_dim", _QWEN3_HEAD_DIM)}


def _smollm3(config: HFConfig) -> dict[str, Any]:
    values = _shared(config, theta=_SMOLLM3_THETA)
    every = config.size("no_rope_layer_interval", _NO_ROPE_INTERVAL)
    rule = [(i + 1) % every != 0 for i in range(values["num_layers"])]
    rotated = config.get("no_rope_layers", rule)
    values["unrotated_layers"] = tuple(i for i, rotates in enumerate(rotated) if not rotates)
    return _windowed(config, values, lambda i: not rotated[i])


_CLASSES = {"sequence": "ForSequenceClassification", "none": "Model"}


def class_name(name: str, config: TransformerConfig) -> str:
    """The class of a decoder: undoes `head_values`."""
    return name + _CLASSES.get(config.head, "ForCausalLM")


def decoder_config(config: TransformerConfig, name: str, model_type: str) -> dict[str, Any]:
    """Undoes `decoder_values`."""
    return {
        "architectures": [class_name(name, config)], "model_type": model_type,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.seq_len,
        "hidden_size": config.embed_dim, "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps, "attention_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip


def _shared_config(config: TransformerConfig, name: str, model_type: str) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh" if config.activation == "geglu" else "silu"
    return {
        **decoder_config(config, name, model_type), **rope_config(config),
        "hidden_act": activation,
    }  # fmt: skip


def _to_llama(config: TransformerConfig) -> dict[str, Any]:
    return {**_shared_config(config, "Llama", "llama"), "mlp_bias": False}


def _to_mistral(config: TransformerConfig) -> dict[str, Any]:
    window = config.window or None
    return {**_shared_config(config, "Mistral", "mistral"), "sliding_window": window}


def _windowed_config(config: TransformerConfig, name: str, model_type: str) -> dict[str, Any]:
    types = layer_types(config)
    full = next((i for i, kind in enumerate(types) if kind == SLIDING), len(types))
    return {
        **_shared_config(config, name, model_type),
        "use_sliding_window": bool(config.window), "sliding_window": config.window or None,
        # Older files have the number alone: so many layers before the first with a window.
        "layer_types": types, "max_window_layers": full,
    }  # fmt: skip


def _to_qwen2(config: TransformerConfig) -> dict[str, Any]:
    return _windowed_config(config, "Qwen2", "qwen2")


def _to_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return _windowed_config(config, "Qwen3", "qwen3")


def _to_smollm3(config: TransformerConfig) -> dict[str, Any]:
    rotated = [int(i not in config.unrotated_layers) for i in range(config.num_layers)]
    return {**_windowed_config(config, "SmolLM3", "smollm3"), "no_rope_layers": rotated}


def layer(theirs: str, ours: str, rule: Rule, kind: str = "weight") -> Entry:
    """An entry of every layer."""
    return Entry(f"layers.{{i}}.{theirs}.{kind}", f"stack/layers/{ours}", rule, "num_layers")


D, F = ("embed_dim",), ("mlp_dim",)
HEADS, KV_HEADS = ("num_heads", "head_dim"), ("num_kv_heads", "head_dim")

LLAMA = Family(
    values=_llama,
    table=(
        Entry("embed_tokens.weight", "tokens", Rule(("vocab_size",), D)),
        layer("input_layernorm", "attention_norm/scale", vector("embed_dim")),
        layer("self_attn.q_proj", "attention/q/kernel", linear(D, HEADS)),
        layer("self_attn.k_proj", "attention/k/kernel", linear(D, KV_HEADS)),
        layer("self_attn.v_proj", "attention/v/kernel", linear(D, KV_HEADS)),
        layer("self_attn.o_proj", "attention/out/kernel", linear(HEADS, D)),
        layer("post_attention_layernorm", "mlp_norm/scale", vector("embed_dim")),
        layer("mlp.gate_proj", "mlp/gate/kernel", linear(D, F)),
        layer("mlp.up_proj", "mlp/up/kernel", linear(D, F)),
        layer("mlp.down_proj", "mlp/down/kernel", linear(F, D)),
        Entry("norm.weight", "final_norm/scale", vector("embed_dim")),
        Entry("lm_head.weight", "head", linear(D, ("vocab_size",)), group="head"),
        Entry("score.weight", "classifier/kernel", linear(D, ("num_classes",)), group="classifier"),
    ),
    prefix="model.",
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    copies={"lm_head.weight": "embed_tokens.weight"},
    head="lm_head.weight",
    tied=False,
    to_config=_to_llama,
)
QK_NORMS = (
    layer("self_attn.q_norm", "attention/q_norm/scale", vector("head_dim")),
    layer("self_attn.k_norm", "attention/k_norm/scale", vector("head_dim")),
)
_QKV_BIASES = tuple(
    layer(f"self_attn.{name}_proj", f"attention/{name}/bias", vector(*dims), "bias")
    for name, dims in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
)

MISTRAL = dataclasses.replace(LLAMA, values=_mistral, to_config=_to_mistral)
QWEN2 = dataclasses.replace(
    LLAMA, values=_qwen2, table=LLAMA.table + _QKV_BIASES, to_config=_to_qwen2
)
QWEN3 = dataclasses.replace(LLAMA, values=_qwen3, table=LLAMA.table + QK_NORMS, to_config=_to_qwen3)
SMOLLM3 = dataclasses.replace(LLAMA, values=_smollm3, tied=True, to_config=_to_smollm3)
