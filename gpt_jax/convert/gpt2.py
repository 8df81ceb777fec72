"""GPT-2's table.  Its products lie as ours, (in, out), with q, k and v side by side."""

from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.llama import class_name, head_values
from gpt_jax.convert.table import Entry, Family, Rule, linear, vector
from gpt_jax.models.config import TransformerConfig

_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
_TO_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}


def _values(config: HFConfig) -> dict[str, Any]:
    config.need("add_cross_attention", False)
    config.need("scale_attn_by_inverse_layer_idx", False)
    width, heads = config.size("n_embd"), config.size("n_head")
    return {
        # A file of the class GPT2Model is a language model too: the head is the embedding.
        "family": "decoder", **head_values(config, "lm"),
        "vocab_size": config.size("vocab_size"), "seq_len": config.size("n_positions", 1024),
        "num_layers": config.size("n_layer"), "embed_dim": width, "num_heads": heads,
        "num_kv_heads": heads, "head_dim": width // heads,
        "mlp_dim": config.size("n_inner", 4 * width),
        "positions": "learned", "norm": "layernorm", "norm_order": "pre", "embed_norm": False,
        "norm_eps": config.number("layer_norm_epsilon", 1e-5), "num_token_types": 0,
        "activation": config.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "bias": True, "qk_norm": False, "scale_embedding": False, "scale_logits": False,
        "scale_attention": config.get("scale_attn_weights", True), "init": "gpt2",
    }  # fmt: skip


def _to_config(config: TransformerConfig) -> dict[str, Any]:
    name = class_name("GPT2", config) if config.head == "sequence" else "GPT2LMHeadModel"
    return {
        "architectures": [name], "model_type": "gpt2",
        "vocab_size": config.vocab_size, "n_positions": config.seq_len,
        "n_embd": config.embed_dim, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.mlp_dim, "layer_norm_epsilon": config.norm_eps,
        "activation_function": _TO_ACTIVATIONS.get(config.activation, "gelu_new"),
        "scale_attn_weights": config.scale_attention, "scale_attn_by_inverse_layer_idx": False,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": 0.0,
    }  # fmt: skip


def _layer(theirs: str, ours: str, rule: Rule) -> Entry:
    return Entry(f"h.{{i}}.{theirs}", f"stack/layers/{ours}", rule, "num_layers")


D, HEADS = ("embed_dim",), ("num_heads", "head_dim")
_QKV = tuple(
    entry
    for k, name in enumerate(("q", "k", "v"))
    for entry in (
        _layer("attn.c_attn.weight", f"attention/{name}/kernel", Rule(D, HEADS, part=(k, 3))),
        _layer("attn.c_attn.bias", f"attention/{name}/bias", Rule((), HEADS, part=(k, 3))),
    )
)

GPT2 = Family(
    values=_values,
    table=(
        Entry("wte.weight", "tokens", Rule(("vocab_size",), D)),
        Entry("wpe.weight", "positions", Rule(("seq_len",), D)),
        _layer("ln_1.weight", "attention_norm/scale", vector("embed_dim")),
        _layer("ln_1.bias", "attention_norm/bias", vector("embed_dim")),
        *_QKV,
        _layer("attn.c_proj.weight", "attention/out/kernel", Rule(HEADS, D)),
        _layer("attn.c_proj.bias", "attention/out/bias", vector("embed_dim")),
        _layer("ln_2.weight", "mlp_norm/scale", vector("embed_dim")),
        _layer("ln_2.bias", "mlp_norm/bias", vector("embed_dim")),
        _layer("mlp.c_fc.weight", "mlp/up/kernel", Rule(D, ("mlp_dim",))),
        _layer("mlp.c_fc.bias", "mlp/up/bias", vector("mlp_dim")),
        _layer("mlp.c_proj.weight", "mlp/down/kernel", Rule(("mlp_dim",), D)),
        _layer("mlp.c_proj.bias", "mlp/down/bias", vector("embed_dim")),
        Entry("ln_f.weight", "final_norm/scale", vector("embed_dim")),
        Entry("ln_f.bias", "final_norm/bias", vector("embed_dim")),
        Entry("lm_head.weight", "head", linear(D, ("vocab_size",)), group="head"),
        Entry("score.weight", "classifier/kernel", linear(D, ("num_classes",)), group="classifier"),
    ),
    prefix="transformer.",
    # The causal mask, which older files hold.
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    copies={"lm_head.weight": "wte.weight"},
    head="lm_head.weight",
    to_config=_to_config,
)
