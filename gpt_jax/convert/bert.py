"""BERT's table, with the heads of its classes (arXiv:1810.04805)."""

from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.table import Entry, Family, Rule, linear, vector
from gpt_jax.models.config import TransformerConfig

_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
HEADS_OF = {
    "BertModel": "none",
    "BertForMaskedLM": "mlm",
    "BertForPreTraining": "mlm",
    "BertForSequenceClassification": "sequence",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "span",
}


def _values(config: HFConfig) -> dict[str, Any]:
    config.need("position_embedding_type", "absolute")
    config.need("is_decoder", False)
    config.need("add_cross_attention", False)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head = HEADS_OF[config.architecture or "BertModel"]
    return {
        "family": "encoder", "head": head, "pool": "pooler",
        "num_classes": config.num_labels() if head in ("sequence", "tokens") else 0,
        "vocab_size": config.size("vocab_size"),
        "seq_len": config.size("max_position_embeddings", 512),
        "num_layers": config.size("num_hidden_layers"), "embed_dim": width, "num_heads": heads,
        "num_kv_heads": heads, "head_dim": width // heads,
        "mlp_dim": config.size("intermediate_size"),
        "positions": "learned", "norm": "layernorm", "norm_order": "post", "embed_norm": True,
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "num_token_types": config.size("type_vocab_size", 2),
        "activation": config.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "bias": True, "qk_norm": False, "scale_embedding": False, "scale_logits": False,
        "scale_attention": True, "init": "gpt2",
    }  # fmt: skip


_CLASSES = {
    "mlm": "BertForMaskedLM",
    "sequence": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "span": "BertForQuestionAnswering",
}


def _to_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES.get(config.head, "BertModel")], "model_type": "bert",
        "vocab_size": config.vocab_size, "max_position_embeddings": config.seq_len,
        "hidden_size": config.embed_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_eps, "type_vocab_size": max(1, config.num_token_types),
        "hidden_act": "gelu_new" if config.activation == "gelu" else "gelu",
        "position_embedding_type": "absolute", "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _dense(theirs: str, ours: str, inputs, outputs, **place) -> tuple[Entry, Entry]:
    return (
        Entry(f"{theirs}.weight", f"{ours}/kernel", linear(inputs, outputs), **place),
        Entry(f"{theirs}.bias", f"{ours}/bias", vector(*outputs), **place),
    )


def _norm(theirs: str, ours: str, **place) -> tuple[Entry, Entry]:
    return (
        Entry(f"{theirs}.weight", f"{ours}/scale", vector("embed_dim"), **place),
        Entry(f"{theirs}.bias", f"{ours}/bias", vector("embed_dim"), **place),
    )


D, F, HEADS = ("embed_dim",), ("mlp_dim",), ("num_heads", "head_dim")
THEIRS, OURS, BY_LAYER = "encoder.layer.{i}", "stack/layers", {"layers": "num_layers"}

BERT = Family(
    values=_values,
    table=(
        Entry("embeddings.word_embeddings.weight", "tokens", Rule(("vocab_size",), D)),
        Entry("embeddings.position_embeddings.weight", "positions", Rule(("seq_len",), D)),
        Entry(
            "embeddings.token_type_embeddings.weight", "token_types", Rule(("num_token_types",), D)
        ),
        *_norm("embeddings.LayerNorm", "embed_norm"),
        *_dense(f"{THEIRS}.attention.self.query", f"{OURS}/attention/q", D, HEADS, **BY_LAYER),
        *_dense(f"{THEIRS}.attention.self.key", f"{OURS}/attention/k", D, HEADS, **BY_LAYER),
        *_dense(f"{THEIRS}.attention.self.value", f"{OURS}/attention/v", D, HEADS, **BY_LAYER),
        *_dense(f"{THEIRS}.attention.output.dense", f"{OURS}/attention/out", HEADS, D, **BY_LAYER),
        *_norm(f"{THEIRS}.attention.output.LayerNorm", f"{OURS}/attention_norm", **BY_LAYER),
        *_dense(f"{THEIRS}.intermediate.dense", f"{OURS}/mlp/up", D, F, **BY_LAYER),
        *_dense(f"{THEIRS}.output.dense", f"{OURS}/mlp/down", F, D, **BY_LAYER),
        *_norm(f"{THEIRS}.output.LayerNorm", f"{OURS}/mlp_norm", **BY_LAYER),
        *_dense("pooler.dense", "pooler", D, D, group="pooler"),
        *_dense("cls.predictions.transform.dense", "mlm/dense", D, D, group="mlm"),
        *_norm("cls.predictions.transform.LayerNorm", "mlm/norm", group="mlm"),
        Entry("cls.predictions.bias", "mlm/bias", vector("vocab_size"), group="mlm"),
        *_dense("classifier", "classifier", D, ("num_classes",), group="classifier"),
        *_dense("qa_outputs", "classifier", D, (2,), group="span"),
    ),
    prefix="bert.",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    # The head for the next sentence, which no model of ours has.
    ignored=(r"embeddings\.(position_ids|token_type_ids)", r"cls\.seq_relationship\.\w+"),
    copies={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    tied=None,
    to_config=_to_config,
)
