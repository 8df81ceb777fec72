"""Lengths of time in training: steps, tokens, epochs, or a share of the run."""

import dataclasses
import re

_SCALE = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PATTERN = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmbt]?)\s*(steps?|tokens?|epochs?|%)\s*", re.I)


@dataclasses.dataclass(frozen=True)
class Clock:
    """What turns a duration into steps.

    Attributes:
      tokens_per_step: Targets of one global batch.
      tokens_per_epoch: Targets of the training split.
      total_steps: Steps of the run, for shares of it; 0 while it is not known.
    """

    tokens_per_step: int
    tokens_per_epoch: int
    total_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount of "steps", "tokens", "epochs", or "%" of the run."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, field: str, text: str | int) -> "Duration":
        """From "2000 steps", "1.5B tokens", "2 epochs", "5%", or a number of steps.

        Raises:
          ValueError: Anything else; the message names `field`.
        """
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return cls(text, "steps")
        found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if not found or found[1].count(".") > 1:
            raise ValueError(
                f"{field}: {text!r} is not a duration; write '2000 steps', '100M tokens', "
                "'2 epochs' or '5%'"
            )
        unit = found[3].lower()
        unit = unit if unit == "%" else unit.rstrip("s") + "s"
        return cls(float(found[1]) * _SCALE[found[2].lower()], unit)

    def steps(self, clock: Clock) -> int:
        """Whole steps: rounded up for tokens and epochs, so that nothing asked for is left out."""
        if self.unit == "%":
            return round(self.amount / 100 * clock.total_steps)
        if self.unit == "steps":
            return round(self.amount)
        per_unit = 1 if self.unit == "tokens" else clock.tokens_per_epoch
        return -int(-self.amount * per_unit // clock.tokens_per_step)
