"""Tables of Gemma 1, 2 and 3 (text): arXiv:2403.08295, 2408.00118, 2503.19786.

The weights of norms stay as they are, 0 for a factor of 1: model.norm "rmsnorm_plus_one".
"""

import dataclasses
from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.hf_layers import (
    layer_types,
    rope_config,
    rope_values,
    sliding_layers,
    window_values,
)
from gpt_jax.convert.llama import LLAMA, QK_NORMS, decoder_config, decoder_values, layer
from gpt_jax.convert.table import vector
from gpt_jax.models.config import TransformerConfig

# What transformers takes where the file says nothing.
_HEAD_DIM, _SCORE_WIDTH, _WINDOW, _SCORE_CAP, _LOGIT_CAP = 256, 256, 4096, 50.0, 30.0
_GEMMA2_PATTERN, _GEMMA3_PATTERN = 2, 6
_THETA, _GEMMA3_THETA = 1e4, 1e6


def _shared(config: HFConfig) -> dict[str, Any]:
    config.need("use_bidirectional_attention", False)
    values = decoder_values(config)
    return values | {
        "head_dim": config.size("head_dim", _HEAD_DIM), "norm": "rmsnorm_plus_one",
        "activation": "geglu", "scale_embedding": True,
    }  # fmt: skip


def _gemma(config: HFConfig) -> dict[str, Any]:
    # The first files say "gelu" and mean its tanh form, as transformers knows.
    config.need("hidden_act", "gelu_pytorch_tanh", "gelu")
    return {**_shared(config), **rope_values(config, _THETA)}


def _layered(config: HFConfig, pattern: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share: every layer but the last of `pattern` has a window."""
    config.need("hidden_activation", "gelu_pytorch_tanh")
    values = _shared(config)
    width = config.size("query_pre_attn_scalar", _SCORE_WIDTH)
    sliding = sliding_layers(config, values["num_layers"], lambda i: (i + 1) % pattern)
    return {
        **values, "norm_order": "sandwich",
        "score_width": 0 if width == values["head_dim"] else width,
        **window_values(config.optional("sliding_window", _WINDOW), sliding),
    }  # fmt: skip


def _gemma2(config: HFConfig) -> dict[str, Any]:
    return {
        **_layered(config, _GEMMA2_PATTERN), **rope_values(config, _THETA),
        "attention_softcap": float(config.optional("attn_logit_softcapping", _SCORE_CAP) or 0),
        "logit_softcap": float(config.optional("final_logit_softcapping", _LOGIT_CAP) or 0),
    }  # fmt: skip


def _gemma3(config: HFConfig) -> dict[str, Any]:
    config.need("attn_logit_softcapping", None)  # which transformers does not read
    pattern = config.size("sliding_window_pattern", _GEMMA3_PATTERN)
    values = {**_layered(config, pattern), "qk_norm": True}
    values["logit_softcap"] = float(config.get("final_logit_softcapping", 0))
    rope = rope_values(config, _GEMMA3_THETA, _THETA)
    if not values["window"]:
        rope["rope_local_theta"] = 0.0
    return values | rope


_ACTIVATION = "gelu_pytorch_tanh"


def _to_gemma(config: TransformerConfig) -> dict[str, Any]:
    return {
        **decoder_config(config, "Gemma", "gemma"), **rope_config(config),
        "hidden_act": _ACTIVATION, "hidden_activation": _ACTIVATION,
    }  # fmt: skip


def _layered_config(config: TransformerConfig, name: str, model_type: str) -> dict[str, Any]:
    """Undoes `_layered`."""
    return {
        **decoder_config(config, name, model_type), "hidden_activation": _ACTIVATION,
        "query_pre_attn_scalar": config.score_width or config.head_dim,
        "sliding_window": config.window or _WINDOW, "layer_types": layer_types(config),
        "final_logit_softcapping": config.logit_softcap or None,
    }  # fmt: skip


def _to_gemma2(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_layered_config(config, "Gemma2", "gemma2"), **rope_config(config),
        "attn_logit_softcapping": config.attention_softcap or None,
    }  # fmt: skip


def _to_gemma3(config: TransformerConfig) -> dict[str, Any]:
    name = "Gemma3" if config.head == "lm" else "Gemma3Text"
    return {
        **_layered_config(config, name, "gemma3_text"), **rope_config(config, two_bases=True),
        "attn_logit_softcapping": None,
    }  # fmt: skip


_NORMS = (
    layer("input_layernorm", "attention_norm/scale", vector("embed_dim")),
    layer("post_attention_layernorm", "attention_post_norm/scale", vector("embed_dim")),
    layer("pre_feedforward_layernorm", "mlp_norm/scale", vector("embed_dim")),
    layer("post_feedforward_layernorm", "mlp_post_norm/scale", vector("embed_dim")),
)
_WITHOUT_NORMS = tuple(
    entry
    for entry in LLAMA.table
    if not entry.ours.endswith(("attention_norm/scale", "mlp_norm/scale"))
)

GEMMA = dataclasses.replace(LLAMA, values=_gemma, tied=True, to_config=_to_gemma)
GEMMA2 = dataclasses.replace(
    GEMMA, values=_gemma2, table=_WITHOUT_NORMS + _NORMS, to_config=_to_gemma2
)
GEMMA3 = dataclasses.replace(
    GEMMA2, values=_gemma3, table=GEMMA2.table + QK_NORMS, to_config=_to_gemma3
)
