"""How rotary frequencies are changed: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses

from gpt_jax.models.require import require


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for sequences longer than those of the training.

    Attributes:
      kind: "none"; "linear": all divided by `factor`; "llama3": those of waves longer than
        original_length / low_freq_factor are, those of waves shorter than original_length /
        high_freq_factor are kept, and between lies a ramp (arXiv:2407.21783); "yarn": the same by
        rotations within original_length, and longer queries and keys (arXiv:2309.00071).
      factor: How many times longer the sequences are.
      original_length: Longest sequence of the training.
      low_freq_factor, high_freq_factor: Of "llama3".
      beta_fast, beta_slow: Rotations between which the ramp of "yarn" lies.
      truncate: Whether the ends of that ramp are whole numbers of pairs.
      attention_factor: What "yarn" multiplies queries and keys by; 0: 0.1 ln(factor) + 1.
    """

    kind: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0

    def __post_init__(self):
        kinds = ("none", "linear", "llama3", "yarn")
        require(self.kind in kinds, "rope_scaling.kind", self.kind, "one of " + ", ".join(kinds))
        require(self.factor > 0, "rope_scaling.factor", self.factor, "above 0")
        if self.kind in ("llama3", "yarn"):
            right = f"above 0, as kind {self.kind!r} needs"
            require(
                self.original_length > 0,
                "rope_scaling.original_length",
                self.original_length,
                right,
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        right = f"above low_freq_factor {low}"
        require(high > low > 0, "rope_scaling.high_freq_factor", high, right)
