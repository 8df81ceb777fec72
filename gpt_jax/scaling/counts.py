"""Parameters and FLOPs of a Transformer, by arithmetic.  Starts no JAX.

Takes a models.config.TransformerConfig, or anything with its attributes.
"""

from typing import Any


def parameter_counts(config: Any) -> dict[str, int]:
    """Parameters by group: embeddings, attention (cross attention too), mlp, norms, head, adapters.

    An encoder_decoder's groups hold both stacks. Adapters (LoRA) are counted where
    `lora_targets` names the product.
    """
    c = config
    D, L, E = c.embed_dim, c.num_layers, _encoder_layers(c)
    stacks, crosses = L + E, L if E else 0
    norm = D * (2 if c.norm == "layernorm" and c.bias else 1)
    qk = 2 * c.head_dim if c.qk_norm else 0
    around = 2 if c.norm_order == "sandwich" else 1
    ends = (2 if E else 1) * ((c.norm_order != "post") + c.embed_norm)
    return {
        "token embedding": c.vocab_size * D,
        "position embedding": _position_parameters(c) + c.num_token_types * D,
        "attention": (stacks + crosses) * sum(_attention(c).values()),
        "mlp": stacks * sum(_mlp(c).values()),
        "norms": stacks * (2 * around * norm + qk) + crosses * (around * norm + qk) + ends * norm,
        "head": _head_parameters(c, norm),
        "adapters": _adapters(c),
    }


def _encoder_layers(c: Any) -> int:
    return c.num_encoder_layers if c.family == "encoder_decoder" else 0


def _attention(c: Any) -> dict[str, int]:
    """Weights and biases of the products of one attention."""
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
    bias = 1 if c.bias else 0
    qkv = 1 if c.bias or c.qkv_bias else 0
    return {
        "q": D * N * H + qkv * N * H,
        "k": D * K * H + qkv * K * H,
        "v": D * K * H + qkv * K * H,
        "out": N * H * D + bias * D,
    }


def _mlp(c: Any) -> dict[str, int]:
    D, F = c.embed_dim, c.mlp_dim
    bias = 1 if c.bias else 0
    gate = {"gate": D * F + bias * F} if c.activation in ("swiglu", "geglu") else {}
    return {"up": D * F + bias * F, **gate, "down": F * D + bias * D}


def _position_parameters(c: Any) -> int:
    stacks = 2 if _encoder_layers(c) else 1
    sizes = {"learned": c.seq_len * c.embed_dim, "relative": c.relative_buckets * c.num_heads}
    return stacks * sizes.get(c.positions, 0)


def _head_parameters(c: Any, norm: int) -> int:
    D, bias = c.embed_dim, 1 if c.bias else 0
    if c.head == "lm":
        return 0 if c.tied else D * c.vocab_size
    if c.head == "mlm":
        return D * D + bias * D + norm + c.vocab_size
    if c.head == "none":
        return 0
    classes = 2 if c.head == "span" else c.num_classes
    pooler = D * D + bias * D if (c.head, c.pool) == ("sequence", "pooler") else 0
    return pooler + D * classes + bias * c.classifier_bias * classes


def _adapters(c: Any) -> int:
    if not c.lora_rank:
        return 0
    D, F, heads = c.embed_dim, c.mlp_dim, (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)
    attention = {"q": D + heads[0], "k": D + heads[1], "v": D + heads[1], "out": D + heads[0]}
    names = {f"attention/{name}": size for name, size in attention.items()}
    names |= {f"mlp/{name}": D + F for name in _mlp(c)}
    cross = {f"cross_attention/{name}": size for name, size in attention.items()}
    total, layer = 0, "layers" if c.scan else "layers_{}"
    stacks = [("stack", c.num_layers, names | (cross if _encoder_layers(c) else {}))]
    stacks.append(("encoder", _encoder_layers(c), names))
    for stack, number, products in stacks:
        for i in range(number):
            for name, size in products.items():
                if c.has_adapter(f"{stack}/{layer.format(i)}/{name}"):
                    total += c.lora_rank * size
    return total


def optimizer_slots(name: str, config: Any) -> int:
    """Numbers that an optimizer of all parameters keeps: two each, but one for Muon's matrices."""
    slots = 2 * num_parameters(config)
    if name == "muon":
        c = config
        attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
        mlp = (3 if c.activation in ("swiglu", "geglu") else 2) * c.embed_dim * c.mlp_dim
        E = _encoder_layers(c)
        slots -= (c.num_layers * (2 if E else 1) + E) * attention + (c.num_layers + E) * mlp
    return slots


def num_parameters(config: Any) -> int:
    """All parameters."""
    return sum(parameter_counts(config).values())


def flops_per_token(config: Any, length: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `length`.

    The rule: 6 for each weight of a product (2 forward, 4 backward), so attention, MLP and head
    but neither embeddings nor norms (arXiv:2001.08361, section 2.1); and 6 * L * N * H * length for
    the scores and the weighted values, of which causal attention needs the half: a token sees
    length / 2 keys on average, or in a layer with a window at most the window. An encoder needs all
    of it. In an encoder_decoder a token of the
    decoder stands for one of the encoder too, whose input is taken to be as long.
    """
    c = config
    counts = parameter_counts(c)
    head = c.embed_dim * c.vocab_size if c.head in ("lm", "mlm") else counts["head"]
    products = counts["attention"] + counts["mlp"] + head
    bidirectional = _encoder_layers(c) + (c.num_layers if _encoder_layers(c) else 0)  # and cross
    causal = c.num_layers
    if c.family == "encoder":
        bidirectional, causal = c.num_layers, 0
    windowed = c.num_layers - len(c.global_layers) if 0 < c.window < length else 0
    keys = (causal - windowed + 2 * bidirectional) * length
    keys += windowed * c.window * (2 - c.window / length)
    return 6.0 * products + 6.0 * keys * c.num_heads * c.head_dim


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
