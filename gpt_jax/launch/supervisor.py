"""Starts a training command again when it crashes, and knows when that is of no use."""

import pathlib
import time
from collections.abc import Callable, Sequence

from gpt_jax.launch.group import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    USER_MISTAKE,
    commands,
    in_words,
    run_together,
)
from gpt_jax.launch.run_folder import halted_at, newest_step, read_receipt
from gpt_jax.parallel.processes import ALONE, Processes
from gpt_jax.train.interrupts import Interrupts

_MOST_IN_VAIN = 3  # starts in a row that end with the same newest checkpoint
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds


def supervise(
    command: Sequence[str],
    workdir: pathlib.Path,
    *,
    processes: Processes = ALONE,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Runs a command until it has finished, was interrupted, or cannot get on.

    A signal is handed on to the command, which saves and ends; then nothing is started again. Of
    several processes those that belong here are started and watched: all, or one on each host.

    Args:
      command: Trains in `workdir`, and continues there.
      workdir: The run directory, from which it is told how far the run is.
      processes: Which the command is to be, as options say it.
      say: Takes the lines for people.
      sleep: Waits so many seconds.

    Returns:
      FINISHED; USER_MISTAKE, which another start would only repeat; INTERRUPTED; or FAILED: the
      run halted for a loss that is not finite, or is in a crash loop.
    """
    in_vain, wait = 0, _FIRST_WAIT
    with Interrupts() as interrupts:
        while True:
            before, receipt = newest_step(workdir), read_receipt(workdir)
            started = commands(command, processes)
            code = run_together(started, interrupts, workdir, say)
            if code in (FINISHED, USER_MISTAKE, INTERRUPTED):
                return code
            after = newest_step(workdir)
            how = in_words(code)
            if interrupts.requested:
                say(f"supervisor: {interrupts.requested}; the run ended with {how}")
                return FAILED
            new = read_receipt(workdir)
            if step := halted_at(new) if new != receipt else None:
                say(
                    f"supervisor: the run halted at step {step}: not finite, or a spike; a new "
                    'start would halt there again; train.on_nonfinite "skip" or "rewind" goes on'
                )
                return FAILED
            if after > before:
                in_vain, wait = 0, _FIRST_WAIT
            in_vain += 1
            where = f"the newest checkpoint is {after}" if after >= 0 else "no step is saved"
            if in_vain >= _MOST_IN_VAIN:
                say(
                    f"supervisor: crash loop: {where}, and {in_vain} starts in a row came no "
                    f"further, the last ended with {how}; it is not started again"
                )
                return FAILED
            say(f"supervisor: the run ended with {how}; {where}; next start in {wait:g} s")
            _sleep(wait, interrupts, sleep)
            wait = min(2 * wait, _LONGEST_WAIT)
            if interrupts.requested:
                return INTERRUPTED if after >= 0 else FAILED


def _sleep(seconds: float, interrupts: Interrupts, sleep: Callable[[float], None]) -> None:
    """Waits, in parts: a signal ends it."""
    while seconds > 0 and not interrupts.requested:
        sleep(min(seconds, 1.0))
        seconds -= 1.0
