"""What a person sees of a run: a bar on a terminal, one short line a row elsewhere."""

import sys
import time

from tqdm import tqdm

from gpt_jax.runs.line_file import without_room


class Progress:
    """Shows steps out of a total.

    Args:
      start: Steps done before.
      total: Steps of the run.
      quiet: Show nothing: another process does.
    """

    def __init__(self, start: int, total: int, quiet: bool = False):
        self._total, self._quiet = total, quiet
        self._digits = len(str(total))
        # dynamic_ncols follows the window; disable=None: no bar when stderr is not a terminal.
        self._bar = tqdm(
            total=total, initial=start, unit="step", disable=quiet or None, dynamic_ncols=True,
            leave=False,
        )  # fmt: skip
        self._rated_step: int | None = None
        self._rated_time = 0.0

    def step(self) -> None:
        """One more step is under way."""
        self._bar.update()

    def row(self, step: int, loss: float, tokens_per_sec: float | None, mfu: float | None) -> None:
        """Figures of a step that is done; None: not known."""
        figures = f"loss {loss:.4f}"
        if tokens_per_sec is not None:
            figures += f"  {_count(tokens_per_sec)} tok/s"
        if mfu is not None:
            figures += f"  mfu {100 * mfu:.{0 if mfu >= 0.1 else 1}f}%"
        if not self._bar.disable:
            self._bar.set_postfix_str(figures)
            return
        eta = ""
        if self._rated_step is None:  # no rate yet to tell the end by
            self._rated_step, self._rated_time = step, time.monotonic()
        else:
            rate = (time.monotonic() - self._rated_time) / (step - self._rated_step)
            eta = f"  eta {_clock(rate * (self._total - step))}"
        self.line(f"step {step:>{self._digits}}/{self._total}  {figures}{eta}")

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._quiet:
            return
        if self._bar.disable:
            with without_room():  # the output may be a file on the disk of the run
                print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


def _count(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
