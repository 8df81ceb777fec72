"""What a user asks for when text is generated."""

import dataclasses
import math
from collections.abc import Sequence

from gpt_jax.ops.penalties import MAX_NGRAM

# Of a request's top_logprobs; the widest that OpenAI's clients ask for.
MAX_TOP_LOGPROBS = 20
# What an int32 holds: counts and ids go to the device.
_MOST = 2**31 - 1
# Penalties and biases beyond it mean nothing, and float32 could not hold the sum of the largest.
_MOST_PENALTY = 10_000


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    What changes logits comes in this order: logit_bias, repetition_penalty, frequency and presence
    penalty, no_repeat_ngram, min_tokens, a constraint; then temperature, top_k, top_p, min_p.
    Where the others leave nothing of what the constraint allows, the constraint alone counts.

    Attributes:
      max_tokens: Most tokens to generate; the context's end may come first.
      min_tokens: Before so many, no token that ends the text is drawn.
      temperature: Divides the logits; 0: always the most likely token.
      top_k: Only the k most likely tokens; 0: all.
      top_p: Only the most likely tokens that together have this probability; 1: all.
      min_p: Only tokens at least this fraction as likely as the most likely one; 0: all.
      repetition_penalty: Divides the positive logits of tokens of the prompt and the text and
        multiplies the negative ones (arXiv:1909.05858); 1: none.
      presence_penalty: Subtracted from the logits of tokens that were generated.
      frequency_penalty: Subtracted from them once for each time.
      logit_bias: (id, bias) pairs, added to the logits; -100 practically forbids a token.
      no_repeat_ngram: No n tokens in a row occur twice in prompt and text together; 0: they may.
        At most penalties.MAX_NGRAM.
      n: Continuations of each prompt.
      stop: Strings that end the text; they are not part of it.
      stop_ids: Ids that end the text, beside the model's own.
      ignore_eos: The model's own ids do not end the text.
      top_logprobs: How many of the most likely tokens are reported with each one.
      seed: The same seed gives the same text, whatever else is generated beside it.

    Raises:
      ValueError: a value is not allowed; the message names field, value and what is.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    no_repeat_ngram: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, least, most in (
            ("max_tokens", 0, _MOST), ("min_tokens", 0, self.max_tokens), ("n", 1, _MOST),
            ("top_k", 0, _MOST), ("no_repeat_ngram", 0, MAX_NGRAM),
            ("top_logprobs", 0, MAX_TOP_LOGPROBS),
            # JAX without 64-bit integers would silently drop the upper half of a longer seed.
            ("seed", 0, 2**32 - 1),
        ):  # fmt: skip
            in_range = _is_int(getattr(self, name), least, most)
            of = "max_tokens " if name == "min_tokens" else ""
            self._check(name, in_range, f"an integer from {least} to {of}{most}")
        in_range = _is_number(self.temperature) and self.temperature >= 0
        self._check("temperature", in_range, "a number of at least 0")
        in_range = _is_number(self.top_p) and 0 < self.top_p <= 1
        self._check("top_p", in_range, "a number above 0 and at most 1")
        for name, least, most in (
            ("min_p", 0, 1), ("repetition_penalty", 1 / _MOST_PENALTY, _MOST_PENALTY),
            ("presence_penalty", -_MOST_PENALTY, _MOST_PENALTY),
            ("frequency_penalty", -_MOST_PENALTY, _MOST_PENALTY),
        ):  # fmt: skip
            value = getattr(self, name)
            in_range = _is_number(value) and least <= value <= most
            self._check(name, in_range, f"a number from {least} to {most}")
        self._check(
            "logit_bias", _are_biases(self.logit_bias),
            f"a tuple of pairs of an id and a number from {-_MOST_PENALTY} to {_MOST_PENALTY}",
        )  # fmt: skip
        strings = isinstance(self.stop, tuple) and all(
            isinstance(string, str) and string for string in self.stop
        )
        self._check("stop", strings, "a tuple of non-empty strings")
        ids = isinstance(self.stop_ids, tuple) and all(_is_int(i, 0, _MOST) for i in self.stop_ids)
        self._check("stop_ids", ids, "a tuple of ids")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")

    def ends(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """Ids that end the text of a model with these ids."""
        return (*(() if self.ignore_eos else eos_ids), *self.stop_ids)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: {getattr(self, name)!r} is not {allowed}")


def _is_int(value, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An int too long for a float is no number that could be used.
    return numeric and abs(value) < 1e300 and math.isfinite(value)


def _are_biases(pairs) -> bool:
    return isinstance(pairs, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and _is_int(pair[0], 0, _MOST)
        and _is_number(pair[1]) and abs(pair[1]) <= _MOST_PENALTY for pair in pairs
    )  # fmt: skip
