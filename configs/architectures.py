"""Architectures by name, as values of the config's model section.

The exact ones match what Hugging Face calls BertConfig(), T5Config() and so on, field for field
(tests/test_configs.py); `small` ones are for a laptop's CPU.
"""

from ml_collections import ConfigDict


def bert(layers=12, width=768, heads=12, vocab_size=30_522, seq_len=512):
    """BERT-base by default (arXiv:1810.04805); large is 24, 1024, 16."""
    return ConfigDict({
        "family": "encoder", "head": "mlm", "vocab_size": vocab_size, "seq_len": seq_len,
        "num_layers": layers, "embed_dim": width, "num_heads": heads, "positions": "learned",
        "norm": "layernorm", "norm_order": "post", "norm_eps": 1e-12, "embed_norm": True,
        "num_token_types": 2, "activation": "gelu_exact", "bias": True, "qk_norm": False,
        "init": "gpt2", "dropout": 0.1,
    })  # fmt: skip


# name: width, layers of each stack, heads, head width, MLP of v1.0, MLP of v1.1
_T5 = {
    "small": (512, 6, 8, 64, 2048, 1024),
    "base": (768, 12, 12, 64, 3072, 2048),
    "large": (1024, 24, 16, 64, 4096, 2816),
}


def t5(size="small", version="1.1", vocab_size=32_128, seq_len=512):
    """T5 v1.0 (arXiv:1910.10683) or v1.1 (arXiv:2002.05202); v1.1's small has 8 layers, 6 heads."""
    width, layers, heads, head_dim, plain, gated = _T5[size]
    if (size, version) == ("small", "1.1"):
        layers, heads = 8, 6
    return ConfigDict({
        "family": "encoder_decoder", "vocab_size": vocab_size, "seq_len": seq_len,
        "num_layers": layers, "embed_dim": width, "num_heads": heads, "head_dim": head_dim,
        "mlp_dim": plain if version == "1.0" else gated, "positions": "relative",
        "norm": "rmsnorm", "norm_eps": 1e-6, "qk_norm": False, "scale_attention": False,
        "activation": "relu" if version == "1.0" else "geglu", "init": "fan_in",
        "tied": version == "1.0", "scale_logits": version == "1.0", "start_id": 0, "dropout": 0.1,
    })  # fmt: skip


def original_transformer(big=False, vocab_size=37_000, seq_len=512):
    """The Transformer of arXiv:1706.03762, table 3: base, or big."""
    return ConfigDict({
        "family": "encoder_decoder", "vocab_size": vocab_size, "seq_len": seq_len,
        "num_layers": 6, "embed_dim": 1024 if big else 512, "num_heads": 16 if big else 8,
        "mlp_dim": 4096 if big else 2048, "positions": "sinusoidal", "norm": "layernorm",
        "norm_order": "post", "norm_eps": 1e-6, "activation": "relu", "bias": True, "tied": True,
        "scale_embedding": True, "qk_norm": False, "init": "fan_in",
        "dropout": 0.3 if big else 0.1,
    })  # fmt: skip


def small(family, layers=4, width=192, heads=6, vocab_size=4096, seq_len=128, **more):
    """What a laptop's CPU trains in minutes: rotary, RMSNorm, qk-norm, ReLU^2."""
    return ConfigDict({
        "family": family, "vocab_size": vocab_size, "seq_len": seq_len, "num_layers": layers,
        "embed_dim": width, "num_heads": heads, "dtype": "bfloat16", **more,
    })  # fmt: skip
