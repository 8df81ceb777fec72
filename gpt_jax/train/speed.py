"""How fast steps are, between two rows: tokens a second, and their share of the peak (MFU).

MFU (arXiv:2204.02311, appendix B) is the FLOPs that the model needs for the tokens, by
`counts.FLOPS_RULE`, over those that the devices could have done in the time.
"""

import time

from gpt_jax.parallel.peaks import Roof


class Stopwatch:
    """Time spent on steps alone, between two rows.

    Args:
      done: Steps done so far.
    """

    def __init__(self, done: int):
        self._since, self._spent, self._done = time.monotonic(), 0.0, done

    def pause(self) -> None:
        self._spent += time.monotonic() - self._since

    def resume(self) -> None:
        self._since = time.monotonic()

    def lap(self, done: int) -> tuple[float, int]:
        """(seconds, steps) since the last lap; `done` steps are done now.

        Without a step there is no lap: the time counts for the next one.
        """
        self.pause()
        self.resume()
        lap = self._spent, done - self._done
        if lap[1]:
            self._spent, self._done = 0.0, done
        return lap


def speed_row(rate: float, flops_per_token: float, roof: Roof) -> dict[str, float]:
    """The entries of a row of metrics.

    Args:
      rate: Tokens a second, padding too.
      flops_per_token: Forward and backward.
      roof: Of all devices.

    Returns:
      "perf/tokens_per_sec", and "perf/mfu" in [0, 1] if the roof is known.
    """
    row = {"perf/tokens_per_sec": rate}
    if roof.flops_per_second is not None:
        row["perf/mfu"] = rate * flops_per_token / roof.flops_per_second
    return row
