"""What a Transformer is made of: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses

_CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu", "relu2"),
    "init": ("gpt2", "fan_in"),
    "remat": ("none", "dots", "full"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "einsum", "blocked", "xla", "cudnn"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only Transformer by arguments.

    Attributes:
      vocab_size: V, rows of the token embedding and columns of the head.
      seq_len: Longest sequence; the size of the table of learned positions.
      num_layers: L.
      embed_dim: D, model width.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads (arXiv:2305.13245); 0: as many as query heads.
      head_dim: H; 0: embed_dim / num_heads.
      mlp_dim: F; 0: 4 * embed_dim.
      positions: "learned" or "rotary" (arXiv:2104.09864).
      rope_theta: Base of the rotary frequencies.
      norm: "layernorm" or "rmsnorm", before each sublayer and before the head.
      norm_eps: Added to the variance.
      activation: "gelu" (tanh form, as GPT-2), "swiglu" (arXiv:2002.05202) or "relu2"
        (arXiv:2109.08668).
      bias: Biases in products and in layer norms.
      tied: The head is the transposed token embedding.
      qk_norm: RMS norm of queries and keys, per head (arXiv:2302.05442).
      logit_softcap: c in c * tanh(logits / c) (Gemma 2, arXiv:2408.00118); 0: none.
      dropout: Rate after embedding, attention and MLP.
      init: "gpt2": N(0, 0.02^2), residual projections over sqrt(2L); "fan_in": N(0, 1/fan_in),
        residual projections and an untied head start at zero.
      scan: Layers by lax.scan over stacked parameters (one compilation for all) or unrolled
        (faster on CPU).
      remat: What the backward pass recomputes: "none"; "dots" keeps products without batch
        dims; "full" keeps the residual stream alone.
      dtype: Compute dtype; parameters and statistics are float32.
      attention: A name of ops.attention.IMPLEMENTATIONS.
    """

    vocab_size: int
    seq_len: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    activation: str = "relu2"
    bias: bool = False
    tied: bool = False
    qk_norm: bool = True
    logit_softcap: float = 0.0
    dropout: float = 0.0
    init: str = "fan_in"
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "num_layers", "embed_dim", "num_heads"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "logit_softcap"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, name, value, "one of " + ", ".join(allowed))
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "above 0")
        if not self.head_dim:
            right = f"a divisor of embed_dim {self.embed_dim} (or set head_dim)"
            _require(self.embed_dim % self.num_heads == 0, "num_heads", self.num_heads, right)
            self._fill(head_dim=self.embed_dim // self.num_heads)
        if not self.num_kv_heads:
            self._fill(num_kv_heads=self.num_heads)
        if not self.mlp_dim:
            self._fill(mlp_dim=4 * self.embed_dim)
        right = f"a divisor of num_heads {self.num_heads}"
        _require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, right)
        if self.positions == "rotary":
            _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even for rotary positions")

    def _fill(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _require(holds: bool, name: str, value, right: str) -> None:
    if not holds:
        raise ValueError(f"model.{name}: {value!r} is not {right}")
