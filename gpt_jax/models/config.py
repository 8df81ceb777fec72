"""What a Transformer is made of: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses
import re

from gpt_jax.models.require import require
from gpt_jax.models.rope_scaling import RopeScaling

_CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder"),
    "head": ("lm", "mlm", "sequence", "tokens", "span", "none"),
    "pool": ("pooler", "first", "last", "mean"),
    "positions": ("learned", "rotary", "sinusoidal", "relative", "none"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_plus_one"),
    "norm_order": ("pre", "post", "sandwich"),
    "activation": ("gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"),
    "init": ("gpt2", "fan_in"),
    "remat": ("none", "dots", "full"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "einsum", "blocked", "xla", "cudnn", "chunked"),
}

# In which the weights of a model that is not trained may be held; parameters are the first.
WEIGHT_DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Transformer by arguments: GPT, BERT, T5 and the original one are values of them.

    Attributes:
      family: "decoder" (causal), "encoder" (bidirectional) or "encoder_decoder"
        (arXiv:1706.03762).
      head: What the last layer's outputs become: "lm" (next token), "mlm" (BERT's: a dense layer,
        a norm, the tied embedding and a bias), "sequence" (classes of a row, or one number),
        "tokens" (classes of each token), "span" (start and end), "none" (the outputs themselves).
      num_classes: C of the heads "sequence" (1 for a regression) and "tokens".
      pool: What the head "sequence" reads: "pooler" (BERT's dense layer and tanh on the first
        token), the "first" or "last" token, or the "mean" of all.
      vocab_size: V, rows of the token embedding and columns of the head.
      seq_len: Longest sequence; the size of the table of learned positions.
      num_layers: L; of the decoder where there are two stacks.
      num_encoder_layers: Of an encoder_decoder's encoder; 0: num_layers.
      embed_dim: D, model width.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads (arXiv:2305.13245); 0: as many as query heads.
      head_dim: H; 0: embed_dim / num_heads.
      mlp_dim: F; 0: 4 * embed_dim.
      positions: "learned", "rotary" (arXiv:2104.09864), "sinusoidal" (arXiv:1706.03762),
        "relative" (T5's bias by bucket of distance, arXiv:1910.10683) or "none".
      rope_theta: Base of the rotary frequencies.
      rope_scaling: How these are changed.
      rope_local_theta: Base in layers with a window, whose frequencies are not scaled (Gemma 3,
        arXiv:2503.19786); 0: as in all other layers.
      unrotated_layers: Numbers of layers without positions (SmolLM3).
      window: A token sees itself and the window - 1 tokens before (arXiv:2310.06825); 0: all.
      global_layers: Numbers of layers that see all in spite of the window.
      relative_buckets: Of the relative bias.
      relative_max_distance: Where its last bucket begins.
      norm: "layernorm", "rmsnorm", or "rmsnorm_plus_one", which multiplies by 1 + scale (Gemma).
      norm_order: "pre": before each sublayer and before the head; "post": after each residual
        addition, as in the original Transformer and in BERT; "sandwich": as "pre", and once more
        after each sublayer, before its addition (Gemma 2, arXiv:2408.00118).
      norm_eps: Added to the variance.
      embed_norm: A norm after the embedding.
      num_token_types: Rows of an embedding added by `token_types`; 0: none.
      activation: "gelu" (tanh form, as GPT-2), "gelu_exact" (BERT), "relu", "relu2"
        (arXiv:2109.08668), "swiglu" or "geglu" (arXiv:2002.05202; the tanh form).
      bias: Biases in products and in layer norms.
      qkv_bias: Biases of queries, keys and values alone (Qwen2, arXiv:2407.10671).
      classifier_bias: With `bias`, whether the last product of a head for classes has one.
      tied: The head is the transposed token embedding.
      scale_attention: Scores are divided by sqrt(H); T5's are not.
      score_width: The number in place of H there; 0: H.
      attention_softcap: c in c * tanh(score / c) (Gemma 2); 0: none.
      scale_embedding: The embedding is multiplied by sqrt(D).
      scale_logits: The outputs are divided by sqrt(D) before the head (T5 v1.0).
      read_prompts_whole: A decoder reads a prompt, but for its last token, in both directions
        (prefix LM, arXiv:1910.10683, section 3.2).
      start_id: The id that a decoder of an encoder_decoder begins with; -1: the end of a text.
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
      mup_base_width: D_0, the width at which the learning rate was chosen, which then holds at D
        too (muP, arXiv:2203.03466); mlp_dim and num_heads are to grow with D. For m = D / D_0,
        hidden matrices begin with a variance of 1 / m ("fan_in" says so by itself, "gpt2" means
        0.02^2 at D_0), logits are divided by m, and hidden matrices have Adam's learning rate
        over m (optim.width_scaling). 0: the standard parametrisation.
      mup_base_head_dim: H_0, where H grows with D: scores are multiplied by sqrt(H_0) / H, which
        is 1 / sqrt(H) at H_0; 0: heads keep their width, and scores are as without muP.
      mup_base_layers: L_0, the depth at which the learning rate was chosen: what a sublayer adds
        is divided by L / L_0 (CompleteP, arXiv:2505.01618), and "gpt2" draws residual
        projections as at L_0; 0: neither.
      num_experts: E, MLPs of each layer of which a token goes through experts_per_token (Mixtral,
        arXiv:2401.04088); 0: one MLP, for every token.
      experts_per_token: k. With k > 1 the gates of a token add up to 1, with k = 1 its gate is the
        probability that the router gives it (Switch Transformer, arXiv:2101.03961).
      expert_capacity: While training an expert takes at most so many times T k / E of a row's
        T tokens, the first ones (see models.experts); 0.0: all that choose it.
      expert_balance: Weight of the loss that spreads a row's tokens over the experts (1 where they
        are even, up to E), the mean of the layers (arXiv:2101.03961, section 2.2).
      router_z_loss: Weight of the mean square of the router's logsumexp (arXiv:2202.08906).
      lora_rank: R of low-rank adapters (arXiv:2106.09685); 0: none.
      lora_alpha: Their outputs are scaled by alpha / R.
      lora_targets: Patterns (re.search) of the products that get one, by names such as
        "stack/layers_0/attention/q".
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
    family: str = "decoder"
    head: str = "lm"
    num_classes: int = 0
    pool: str = "pooler"
    num_encoder_layers: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_order: str = "pre"
    embed_norm: bool = False
    num_token_types: int = 0
    scale_attention: bool = True
    scale_embedding: bool = False
    scale_logits: bool = False
    read_prompts_whole: bool = False
    start_id: int = -1
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("attention/(q|v)$",)
    rope_scaling: RopeScaling = RopeScaling()  # noqa: RUF009 (it is frozen)
    rope_local_theta: float = 0.0
    unrotated_layers: tuple[int, ...] = ()
    window: int = 0
    global_layers: tuple[int, ...] = ()
    score_width: int = 0
    attention_softcap: float = 0.0
    qkv_bias: bool = False
    classifier_bias: bool = True
    mup_base_width: int = 0
    mup_base_head_dim: int = 0
    mup_base_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 2
    expert_capacity: float = 0.0
    expert_balance: float = 0.01
    router_z_loss: float = 0.001

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "num_layers", "embed_dim", "num_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "num_kv_heads", "head_dim", "mlp_dim", "logit_softcap", "num_encoder_layers",
            "num_token_types", "num_classes", "lora_rank", "window", "rope_local_theta",
            "score_width", "attention_softcap", "mup_base_width", "mup_base_head_dim",
            "mup_base_layers", "num_experts", "expert_capacity", "expert_balance", "router_z_loss",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(value in allowed, name, value, "one of " + ", ".join(allowed))
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "above 0")
        if not self.head_dim:
            right = f"a divisor of embed_dim {self.embed_dim} (or set head_dim)"
            require(self.embed_dim % self.num_heads == 0, "num_heads", self.num_heads, right)
            self._fill(head_dim=self.embed_dim // self.num_heads)
        if not self.num_kv_heads:
            self._fill(num_kv_heads=self.num_heads)
        if not self.mlp_dim:
            self._fill(mlp_dim=4 * self.embed_dim)
        right = f"a divisor of num_heads {self.num_heads}"
        require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, right)
        if self.positions == "rotary":
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even for rotary positions")
        if self.positions == "sinusoidal":
            require(self.embed_dim % 2 == 0, "embed_dim", self.embed_dim, "even for sinusoids")
        if self.family == "encoder_decoder":
            if not self.num_encoder_layers:
                self._fill(num_encoder_layers=self.num_layers)
            require(self.head == "lm", "head", self.head, "'lm', as an encoder_decoder needs")
        self._check_head()
        self._check_layers()
        self._check_mup()
        self._check_experts()
        if self.positions == "relative":
            require(
                self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
                "relative_buckets", self.relative_buckets, "a multiple of 4",
            )  # fmt: skip
            right = f"over relative_buckets {self.relative_buckets}"
            distance = self.relative_max_distance
            require(distance > self.relative_buckets, "relative_max_distance", distance, right)
        id_or_end = f"-1 or an id below vocab_size {self.vocab_size}"
        require(-1 <= self.start_id < self.vocab_size, "start_id", self.start_id, id_or_end)
        if self.lora_rank:
            require(bool(self.lora_targets), "lora_targets", self.lora_targets, "a list of names")
        for pattern in self.lora_targets:
            try:
                re.compile(pattern)
            except re.error as error:
                told = f"{pattern!r} is no regular expression: {error}"
                raise ValueError(f"model.lora_targets: {told}") from None

    def _check_head(self):
        needs_classes = self.head in ("sequence", "tokens")
        if needs_classes:
            right = f"at least 1, as head {self.head!r} needs"
            require(self.num_classes >= 1, "num_classes", self.num_classes, right)
        else:
            right = f"0: head {self.head!r} has no classes"
            require(self.num_classes == 0, "num_classes", self.num_classes, right)
        if self.head == "mlm":
            right = "'encoder', as head 'mlm' needs"
            require(self.family == "encoder", "family", self.family, right)
        if self.head == "sequence" and self.pool in ("pooler", "first", "mean"):
            # The first token of a causal model has seen nothing else.
            right = "'last', as a decoder needs"
            require(self.family == "encoder", "pool", self.pool, right)

    def _check_layers(self):
        if not isinstance(self.rope_scaling, RopeScaling):  # as it is in JSON
            self._fill(rope_scaling=RopeScaling(**self.rope_scaling))
        for name in ("global_layers", "unrotated_layers"):
            numbers = tuple(getattr(self, name))
            right = f"numbers of layers, below num_layers {self.num_layers}"
            require(all(0 <= i < self.num_layers for i in numbers), name, numbers, right)
            self._fill(**{name: numbers})
        decoder = self.family == "decoder" and not self.read_prompts_whole
        require(decoder or not self.window, "window", self.window, "0, as only a decoder has one")
        for name in ("global_layers", "rope_local_theta"):
            value = getattr(self, name)
            require(bool(self.window) or not value, name, value, "for models with a window")
        rotary = self.positions == "rotary"
        for name in ("rope_local_theta", "unrotated_layers"):
            value = getattr(self, name)
            require(rotary or not value, name, value, "for rotary positions")
        scaled = self.rope_scaling.kind != "none"
        require(rotary or not scaled, "rope_scaling", self.rope_scaling, "for rotary positions")
        if self.unrotated_layers and self.family == "encoder_decoder":
            raise ValueError("model.unrotated_layers: an encoder_decoder has none")

    def _check_mup(self):
        """Refuses what muP and CompleteP have no rule for."""
        rules = (
            ("mup_base_width", "positions", self.positions != "relative"),
            ("mup_base_width", "scale_attention", self.scale_attention),
            ("mup_base_width", "scale_embedding", not self.scale_embedding),
            ("mup_base_width", "scale_logits", not self.scale_logits),
            ("mup_base_head_dim", "mup_base_width", self.mup_base_width > 0),
            ("mup_base_head_dim", "score_width", not self.score_width),
            ("mup_base_layers", "family", self.family != "encoder_decoder"),
            ("mup_base_layers", "norm_order", self.norm_order == "pre"),
        )
        for name, other, fits in rules:
            right = f"0, as model.{other} {getattr(self, other)!r} needs"
            require(fits or not getattr(self, name), name, getattr(self, name), right)

    def _check_experts(self):
        """Refuses what a mixture of experts has no rule for."""
        if not self.num_experts:
            return
        number, right = self.experts_per_token, f"from 1 to num_experts {self.num_experts}"
        require(1 <= number <= self.num_experts, "experts_per_token", number, right)
        right = f"'decoder' or 'encoder', as num_experts {self.num_experts} needs"
        require(self.family != "encoder_decoder", "family", self.family, right)
        right = f"0, as num_experts {self.num_experts} needs"
        require(not self.mup_base_width, "mup_base_width", self.mup_base_width, right)
        products = [f"stack/layers_0/mlp/{name}" for name in ("up", "gate", "down")]
        if self.lora_rank and any(map(self.has_adapter, products)):
            right = f"of attention alone, as num_experts {self.num_experts} needs"
            require(False, "lora_targets", self.lora_targets, right)

    @property
    def width_multiplier(self) -> float:
        """m_d of muP, D / D_0; 1 in the standard parametrisation."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def depth_multiplier(self) -> float:
        """m_L of CompleteP, L / L_0; 1 without it."""
        return self.num_layers / self.mup_base_layers if self.mup_base_layers else 1.0

    @property
    def score_scale(self) -> float:
        """What scores of attention are multiplied by."""
        if not self.scale_attention:
            return 1.0
        if self.mup_base_head_dim not in (0, self.head_dim):
            return self.mup_base_head_dim**0.5 / self.head_dim
        return (self.score_width or self.head_dim) ** -0.5

    def has_adapter(self, product: str) -> bool:
        """Whether a product ("stack/layers_0/attention/q") is one of lora_targets."""
        return any(occurs(pattern, product) for pattern in self.lora_targets)

    def _fill(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)


def occurs(pattern: str, name: str) -> bool:
    """In the name as it is or as it is when layers are stacked: model.scan is free to change."""
    stacked = re.sub(r"(^|/)layers_\d+/", r"\1layers/", name)
    return bool(re.search(pattern, name) or re.search(pattern, stacked))
