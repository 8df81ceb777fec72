"""Ends a run that hangs, and says where."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from etils import epath

from gpt_jax.runs.events import EventLog, Phases

STALLED = 70  # exit code


class Watchdog:
    """A context in whose threads a phase may last `timeout` seconds and no longer.

    Then all stacks go to stacks-<process>.txt, one line that names host, process and phase to the
    standard error, the time to events.jsonl as "stalled", and the process ends with STALLED: what
    hangs in a library or a device cannot be asked to stop.

    Args:
      phases: Which the loop enters.
      timeout: Seconds; 0: nothing is watched.
      workdir: The run directory.
      events: Its log.
      process: Which of several it is.
      leave: Ends the process.
    """

    def __init__(
        self,
        phases: Phases,
        timeout: float,
        workdir: epath.PathLike,
        events: EventLog,
        process: int = 0,
        leave: Callable[[int], None] = os._exit,
    ):
        self._phases, self._timeout, self._events = phases, timeout, events
        self._path = os.path.join(workdir, f"stacks-{process}.txt")
        self._process, self._leave = process, leave
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._timeout and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout / 10)):
            phase, since = self._phases.now
            seconds = time.monotonic() - since
            if seconds > self._timeout:
                self._end(phase, seconds)
                return

    def _end(self, phase: str, seconds: float) -> None:
        with open(self._path, "w") as file:
            file.write(f"{phase} for {seconds:.1f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._phases.enter(phase, counts_as="stalled")
        self._events.event("stalled", phase_of_stall=phase, seconds_of_stall=round(seconds, 3))
        self._events.write()
        print(
            f"error: train.stall_timeout: process {self._process} on {socket.gethostname()} has "
            f"been in phase {phase!r} for {seconds:.1f} s (over {self._timeout:g}); stacks of all "
            f"threads: {self._path}",
            file=sys.stderr,
            flush=True,
        )
        self._leave(STALLED)
