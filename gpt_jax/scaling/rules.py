"""Published rules for learning rate and batch, and where each was read.  Starts no JAX.

All are for AdamW and sizes above 5 million parameters; below that they are a place to begin a
sweep. A rule's numbers hold for its own count of parameters and FLOPs, which `counts` names.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Peak learning rate and tokens of a batch; warmup and beta2 where the rule has them."""

    learning_rate: float
    batch_tokens: float
    warmup_tokens: float | None = None
    beta2: float | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of (num_params, num_tokens, flops), with its source.

    `read` tells where the constants were read; "not re-read" marks those written down from memory.
    """

    form: str
    counts: str
    source: str
    read: str
    suggest: Callable[[float, float, float], Suggestion]


def _porian(num_params: float, num_tokens: float, flops: float) -> Suggestion:
    ratio = num_params / 108e6
    batch = 160 * 2048 * ratio ** (2 / 3)
    return Suggestion(
        learning_rate=0.0047 * ratio ** (-1 / 3),
        batch_tokens=batch,
        warmup_tokens=num_params,
        beta2=0.95 if batch >= 2**19 else 0.99,
    )


def _deepseek(num_params: float, num_tokens: float, flops: float) -> Suggestion:
    return Suggestion(0.3118 * flops**-0.1250, 0.2920 * flops**0.3271)


def _step_law(num_params: float, num_tokens: float, flops: float) -> Suggestion:
    rate = 1.79 * num_params**-0.713 * num_tokens**0.307
    return Suggestion(rate, 0.58 * num_tokens**0.571)


RULES = {
    "porian": Rule(
        form="lr = 0.0047 (N / 108e6)^(-1/3), batch = 160 * 2048 (N / 108e6)^(2/3) tokens",
        counts="N with the head, without embeddings",
        source="arXiv:2406.19146",
        read="in the code of a model ladder that uses it (OLMo-core, which halves the rate)",
        suggest=_porian,
    ),
    "deepseek": Rule(
        form="lr = 0.3118 C^-0.1250, batch = 0.2920 C^0.3271 tokens",
        counts="C of non-embedding FLOPs with attention",
        source="arXiv:2401.02954",
        read="not re-read",
        suggest=_deepseek,
    ),
    "step_law": Rule(
        form="lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens",
        counts="N without embeddings",
        source="arXiv:2503.04715",
        read="in a summary of the paper",
        suggest=_step_law,
    ),
}


def suggest(rule: str, num_params: float, num_tokens: float, flops: float) -> Suggestion:
    """What a rule says for a run.

    Raises:
      ValueError: No such rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule: {rule!r} is not one of {', '.join(RULES)}")
    return RULES[rule].suggest(num_params, num_tokens, flops)
