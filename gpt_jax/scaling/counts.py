"""Parameters and FLOPs of a Transformer, by arithmetic.  Starts no JAX.

Takes anything with the attributes of models.config.TransformerConfig.
"""

from typing import Any


def parameter_counts(config: Any) -> dict[str, int]:
    """Parameters by group: token and position embeddings, attention, mlp, norms, head."""
    c = config
    D, N, K, H, F, L = (
        c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim, c.num_layers,
    )  # fmt: skip
    attention = D * (N + 2 * K) * H + N * H * D
    mlp = (3 if c.activation == "swiglu" else 2) * D * F
    norm = D * (2 if c.norm == "layernorm" and c.bias else 1)
    norms = 2 * norm + (2 * H if c.qk_norm else 0)
    if c.bias:
        attention += (N + 2 * K) * H + D
        mlp += (2 if c.activation == "swiglu" else 1) * F + D
    return {
        "token embedding": c.vocab_size * D,
        "position embedding": c.seq_len * D if c.positions == "learned" else 0,
        "attention": L * attention,
        "mlp": L * mlp,
        "norms": L * norms + norm,
        "head": 0 if c.tied else D * c.vocab_size,
    }


def optimizer_slots(name: str, config: Any) -> int:
    """Numbers that an optimizer keeps: two a parameter, but one for each of Muon's matrices."""
    slots = 2 * num_parameters(config)
    if name == "muon":
        c = config
        attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
        mlp = (3 if c.activation == "swiglu" else 2) * c.embed_dim * c.mlp_dim
        slots -= c.num_layers * (attention + mlp)
    return slots


def num_parameters(config: Any) -> int:
    """All parameters."""
    return sum(parameter_counts(config).values())


def flops_per_token(config: Any, length: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `length`.

    The rule: 6 for each weight of a product (2 forward, 4 backward), so attention, MLP and head
    but neither embeddings nor norms (arXiv:2001.08361, section 2.1); and 6 * L * N * H * length for
    the scores and the weighted values, of which causal attention needs the half: a token sees
    length / 2 keys on average.
    """
    counts = parameter_counts(config)
    products = counts["attention"] + counts["mlp"] + config.embed_dim * config.vocab_size
    attended = config.num_layers * config.num_heads * config.head_dim * length
    return 6.0 * products + 6.0 * attended


# Dense bf16 FLOP/s of one device by a part of its `device_kind`, from the vendors' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s a device can reach in bf16; None where it is not known."""
    for name, flops in _PEAK_FLOPS.items():
        if name in device_kind:
            return flops
    return None
