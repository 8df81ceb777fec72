"""Parameters and FLOPs of a Transformer, by arithmetic.  Starts no JAX.

Takes a models.config.TransformerConfig, or anything with its attributes.
"""

import dataclasses
from collections.abc import Collection
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
        "mlp": stacks * (_experts(c) * sum(_mlp(c).values()) + _router(c)),
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


def _experts(c: Any) -> int:
    """MLPs of a layer."""
    return c.num_experts or 1


def _active(c: Any) -> int:
    """MLPs of a layer that a token goes through."""
    return c.experts_per_token if c.num_experts else 1


def _router(c: Any) -> int:
    return c.embed_dim * c.num_experts


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


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of a layer: its name as in `lora_targets`, where, weights, inputs + outputs."""

    name: str
    place: int
    size: int
    ends: int

    @property
    def parameter(self) -> str:
        """The name of its weights."""
        return self.name if self.name.endswith("/router") else f"{self.name}/kernel"

    @property
    def of_source(self) -> bool:
        """Whether it is computed once a token of the encoder's input."""
        return (
            self.name.startswith("encoder/")
            or "/cross_attention/k" in self.name
            or ("/cross_attention/v" in self.name)
        )


def _products(c: Any) -> list[_Product]:
    """Products of the layers. Places rise along the forward pass, from 0, the embeddings."""
    D, F, heads = c.embed_dim, c.mlp_dim, (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)
    ends = {"q": D + heads[0], "k": D + heads[1], "v": D + heads[1], "out": D + heads[0]}
    attention = {name: (size, ends[name]) for name, size in _attention(c).items()}
    layer = {f"attention/{name}": sizes for name, sizes in attention.items()}
    layer |= {f"mlp/{name}": (_active(c) * size, D + F) for name, size in _mlp(c).items()}
    if c.num_experts:
        layer["mlp/router"] = (_router(c), D + c.num_experts)
    E = _encoder_layers(c)
    cross = {f"cross_attention/{name}": sizes for name, sizes in attention.items()} if E else {}
    found = []
    for stack, number, before, products in (
        ("encoder", E, 0, layer),
        ("stack", c.num_layers, E, layer | cross),
    ):
        for i in range(number):
            prefix = f"{stack}/{_layer_name(c, i)}"
            for name, sizes in products.items():
                found.append(_Product(f"{prefix}/{name}", before + i + 1, *sizes))
    return found


def _layer_name(c: Any, number: int) -> str:
    return "layers" if c.scan else f"layers_{number}"


def _adapters(c: Any) -> int:
    if not c.lora_rank:
        return 0
    return c.lora_rank * sum(p.ends for p in _products(c) if c.has_adapter(p.name))


def optimizer_slots(name: str, config: Any) -> int:
    """Numbers that an optimizer of all parameters keeps: two each, but one for Muon's matrices."""
    slots = 2 * num_parameters(config)
    if name == "muon":
        c = config
        attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
        mlp = (3 if c.activation in ("swiglu", "geglu") else 2) * c.embed_dim * c.mlp_dim
        E = _encoder_layers(c)
        mlps = (c.num_layers + E) * _experts(c)
        slots -= (c.num_layers * (2 if E else 1) + E) * attention + mlps * mlp
    return slots


def num_parameters(config: Any, *, embeddings: bool = True, head: bool = True) -> int:
    """Parameters by a convention: all, or without embeddings, without the head, without both.

    The choice moves the exponent of the best size by up to 0.3 at small sizes, so it belongs to
    every figure. Both false: Kaplan's N (arXiv:2001.08361). Embeddings false, head true: the
    weights of products, as Porian counts (arXiv:2406.19146). Both true: Chinchilla's
    (arXiv:2203.15556).

    Args:
      config: The model's.
      embeddings: Whether tables of tokens and positions count.
      head: Whether the head counts. A tied head is the table of tokens: it counts once where either
        is asked for.
    """
    groups = parameter_counts(config)
    tables = groups.pop("token embedding") + groups.pop("position embedding")
    own_head = groups.pop("head")
    tied = config.vocab_size * config.embed_dim if config.head == "lm" and config.tied else 0
    total = sum(groups.values())
    total += own_head if head else 0
    return total + (tables if embeddings else tied if head else 0)


def num_active_parameters(config: Any) -> int:
    """All parameters but those of the experts that a token does not go through."""
    c = config
    layers = c.num_layers + _encoder_layers(c)
    return num_parameters(c) - layers * (_experts(c) - _active(c)) * sum(_mlp(c).values())


FLOPS_RULE = (
    "of the model, a token: 6 for each weight of a product that is trained (2 forward, 2 for the "
    "gradient of its input, 2 for its own), 4 for a frozen one, 2 where nothing trained lies "
    "before it; of experts those that a token goes through; the head too, embeddings and norms "
    "not; scores and weighted values with the keys "
    "that are seen: half of them where attention is causal, at most the window; a row counts as "
    "one sequence, padding too; what is recomputed does not count; a teacher has 2 a weight"
)


def flops_per_token(
    config: Any,
    length: int,
    *,
    source_length: int = 0,
    trained: Collection[str] | None = None,
    head: bool = True,
    attention: bool = True,
) -> float:
    """FLOPs of forward and backward for one token of a sequence of `length`.

    The rule: 6 for each weight of a product (2 forward, 4 backward), so attention, MLP and head
    but neither embeddings nor norms (arXiv:2001.08361, section 2.1; biases count with their
    product); and 6 * L * N * H * length for the scores and the weighted values, of which causal
    attention needs the half: a token sees length / 2 keys on average, or in a layer with a window
    at most the window. An encoder needs all of it. In an encoder_decoder a token of the decoder
    stands for source_length / length of the encoder's.

    Frozen weights have no gradient of their own: 4. Layers below the first that holds something
    trained have no gradient at all: 2. LoRA's adapters are products like others.

    Args:
      config: The model's.
      length: T, tokens of a row.
      source_length: S, tokens of an encoder_decoder's input; 0: as many as `length`.
      trained: Names of the parameters that are trained, as in the tree of parameters; None: all;
        (): none, so a forward pass alone.
      head: Whether the head's products count. Without them and without `attention`: 6 N of
        Kaplan's N, but for norms.
      attention: Whether scores and weighted values count.
    """
    c = config
    E = _encoder_layers(c)
    source_length = source_length or length
    source = source_length / length  # tokens of the encoder for one of the decoder
    lowest = 0 if trained is None else _first_place(c, trained)

    def cost(weights: float, place: int, own: bool, above: bool | None = None) -> float:
        above = place >= lowest if above is None else above
        return weights * (2.0 + 2.0 * above + 2.0 * own)

    def is_trained(name: str) -> bool:
        return trained is None or name in trained

    flops = 0.0
    for p in _products(c):
        tokens = source if p.of_source else 1.0
        flops += tokens * cost(p.size, p.place, is_trained(p.parameter))
        if c.lora_rank and c.has_adapter(p.name):
            own = is_trained(f"{p.name}/lora_a")
            flops += tokens * cost(c.lora_rank * p.ends, p.place, own)
    # A score and a weighted value, forward.
    per_key = 2.0 * c.num_heads * c.head_dim if attention else 0.0
    for i in range(E):
        above = i + 1 >= lowest
        flops += source * (2.0 + 4.0 * above) * per_key * source_length
    for i in range(c.num_layers):
        keys = _keys_seen(c, i, length) + (source_length if E else 0)  # and cross attention
        flops += (2.0 + 4.0 * (E + i + 1 >= lowest)) * per_key * keys
    end = E + c.num_layers + 1
    for name, weights in (_head_products(c, length) if head else {}).items():
        flops += cost(weights, end, is_trained(name), above=lowest < end)
    return flops


def _keys_seen(c: Any, layer: int, length: int) -> float:
    """Keys that a token of a layer sees on average, but for cross attention."""
    if c.family == "encoder":
        return length
    if 0 < c.window < length and layer not in c.global_layers:
        return c.window * (1 - c.window / length / 2)
    return length / 2


def _head_products(c: Any, length: int) -> dict[str, float]:
    """Weights of the head's products for one token, by the name of the parameter."""
    D = c.embed_dim
    if c.head == "lm":
        return {"tokens" if c.tied else "head": float(D * c.vocab_size)}
    if c.head == "mlm":
        return {"tokens": float(D * c.vocab_size), "mlm/dense/kernel": float(D * D)}
    if c.head == "none":
        return {}
    classes = 2 if c.head == "span" else c.num_classes
    if c.head != "sequence":
        return {"classifier/kernel": float(D * classes)}
    pooler = {"pooler/kernel": D * D / length} if c.pool == "pooler" else {}
    return {**pooler, "classifier/kernel": D * classes / length}  # once a row


def _first_place(c: Any, trained: Collection[str]) -> int:
    """The first place of the forward pass with a trained parameter; past the end if none has."""
    E = _encoder_layers(c)
    end = E + c.num_layers + 1
    heads = ("head", "final_norm/", "mlm/", "pooler/", "classifier/")

    def place(name: str) -> int:
        if name.startswith(heads):
            return end
        for stack, before in (("encoder/", 0), ("stack/", E)):
            if name.startswith(f"{stack}layers_"):
                return before + 1 + int(name.split("/")[1].removeprefix("layers_"))
            if name.startswith(stack):
                return before + 1
        return E + 1 if name.startswith("encoder_norm/") else 0

    return min(map(place, trained), default=end + 1)
