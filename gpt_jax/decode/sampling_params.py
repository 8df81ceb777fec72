"""What a user asks for when text is generated."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
      max_tokens: Most tokens to generate; the context's end may come first.
      temperature: Divides the logits; 0: always the most likely token.
      top_k: Only the k most likely tokens; 0: all.
      top_p: Only the most likely tokens that together have this probability; 1: all.
      min_p: Only tokens at least this fraction as likely as the most likely one; 0: all.
      n: Continuations of each prompt.
      stop: Strings that end the text; they are not part of it.
      seed: The same seed gives the same text, whatever else is generated beside it.

    Raises:
      ValueError: a value is not allowed; the message names field, value and what is.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        self._check("max_tokens", _is_int(self.max_tokens, 1), "an integer of at least 1")
        in_range = _is_number(self.temperature) and self.temperature >= 0
        self._check("temperature", in_range, "a number of at least 0")
        self._check("top_k", _is_int(self.top_k, 0), "an integer of at least 0 (0: all tokens)")
        in_range = _is_number(self.top_p) and 0 < self.top_p <= 1
        self._check("top_p", in_range, "a number above 0 and at most 1")
        in_range = _is_number(self.min_p) and 0 <= self.min_p <= 1
        self._check("min_p", in_range, "a number from 0 to 1")
        self._check("n", _is_int(self.n, 1), "an integer of at least 1")
        strings = isinstance(self.stop, tuple) and all(
            isinstance(string, str) and string for string in self.stop
        )
        self._check("stop", strings, "a tuple of non-empty strings")
        # JAX without 64-bit integers would silently drop the upper half of a longer seed.
        in_range = _is_int(self.seed, 0) and self.seed < 2**32
        self._check("seed", in_range, "an integer from 0 to 4294967295")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: {getattr(self, name)!r} is not {allowed}")


def _is_int(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and math.isfinite(value)
