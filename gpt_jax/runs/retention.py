"""Which steps of a run are kept: a pure rule, and its form for Orbax."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any


def preserved(
    steps: Collection[int],
    keep: int,
    best: Collection[int] = (),
    every: int = 0,
    verified: Collection[int] = (),
) -> set[int]:
    """The steps that stay.

    Args:
      steps: Those that are saved.
      keep: The newest so many stay.
      best: These stay.
      every: The first step at or after each multiple of it stays; 0: no such rule.
      verified: Steps that were read back whole. If none of them would stay, the newest does.
    """
    kept = set(sorted(steps)[-keep:]) | (set(best) & set(steps))
    if every:
        first: dict[int, int] = {}
        for step in sorted(steps):
            first.setdefault(step // every, step)
        kept |= {step for multiple, step in first.items() if multiple}
    sound = set(verified) & set(steps)
    if sound and not sound & kept:
        kept.add(max(sound))
    return kept


@dataclasses.dataclass
class Retention:
    """`preserved` as Orbax asks for it; `best` and `verified` change while the run goes on."""

    keep: int
    every: int = 0
    best: frozenset[int] = frozenset()
    verified: set[int] = dataclasses.field(default_factory=set)

    def of(self, steps: Collection[int], *, heed_verified: bool = True) -> set[int]:
        """The steps that stay."""
        verified = self.verified if heed_verified else ()
        return preserved(steps, self.keep, self.best, self.every, verified)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.of(steps)
        return [step in kept for step in steps]
