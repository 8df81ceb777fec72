"""What a run spends its time on: one phase after another, and events.jsonl.  Starts no JAX."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from gpt_jax.runs.line_file import LineFile

FILE = "events.jsonl"  # of process 0; see file_of


def file_of(process: int) -> str:
    """The name of a process's file."""
    return f"events-{process}.jsonl" if process else FILE


# docs/reliability.md tells what belongs to each. At any moment a run is in one of the first seven;
# "lost" is found by goodput.py.
PHASES = (
    "start", "restore", "compile", "data_wait", "step", "evaluate", "save_wait", "stalled", "lost",
)  # fmt: skip


class Phases:
    """Which phase a run is in, and the seconds of each so far.

    One thread enters them; others may look at `now`.

    Attributes:
      now: The phase, and time.monotonic() when it was entered.
    """

    def __init__(self, phase: str = "start"):
        self._totals = dict.fromkeys(PHASES, 0.0)
        self.now = (phase, time.monotonic())

    def enter(self, phase: str, counts_as: str = "") -> None:
        """Ends the phase under way; its time counts for another one if that is given."""
        now = time.monotonic()
        last, since = self.now
        self._totals[counts_as or last] += now - since
        self.now = (phase, now)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another, which then goes on."""
        outer = self.now[0]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def totals(self) -> dict[str, float]:
        """Seconds by phase, with those of the phase under way."""
        self.enter(self.now[0])
        return dict(self._totals)


class EventLog:
    """Appends to events.jsonl: what every phase took since the last time, and what happened.

    Args:
      path: The file; what earlier sessions wrote stays.
      phases: Of this session.
      start_step: The step it goes on from.
      process: Which of several writes.
    """

    def __init__(self, path: os.PathLike, phases: Phases, start_step: int, process: int = 0):
        self._phases, self._process = phases, process
        self._written, self._step = dict.fromkeys(PHASES, 0.0), start_step
        torn = os.path.exists(path) and not _ends_with_newline(path)
        self._file = LineFile(path)
        if torn:  # the process before was killed while it wrote
            self._file.write("")
        self.event("begin", start_step=start_step)

    def event(self, kind: str, **values: Any) -> None:
        """Adds one event."""
        row = {"time": round(time.time(), 3), "process": self._process, "kind": kind, **values}
        self._file.write(json.dumps(row))

    def write(self, step: int | None = None) -> None:
        """Adds the seconds of each phase that were not written yet.

        Args:
          step: Steps done; None: as many as it was told last.
        """
        self._step = step = self._step if step is None else step
        totals = self._phases.totals()
        for phase, seconds in totals.items():
            if (new := seconds - self._written[phase]) > 0:
                self.event("phase", phase=phase, seconds=round(new, 6), step=step)
        self._written = totals

    def close(self) -> None:
        """Writes what is left."""
        self.write()
        self._file.close()


def read_events(path: os.PathLike) -> list[dict[str, Any]]:
    """The events; lines that were cut off are left out."""
    events = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def _ends_with_newline(path: os.PathLike) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        if not file.tell():
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
