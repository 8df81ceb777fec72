"""Runs the runs of a sweep on this machine: a process each, one or several at a time.

Whatever happens to the sweep or to a run, the same command goes on from there: what counts is in
the run directories alone.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from gpt_jax.launch import warm
from gpt_jax.launch.standing import clock, is_done, last_line, log_path, old_rows, row_of
from gpt_jax.launch.sweeps import LEDGER, LOCK, STATE, PlannedRun
from gpt_jax.runs.ledger import DIVERGED, FAILED, FINISHED, write_ledger
from gpt_jax.train.interrupts import INTERRUPTED, Interrupts

ALL_DONE, SOME_FAILED = 0, 1
_TICK = 0.1  # seconds between looks at the processes


def train_command(run: PlannedRun) -> list[str]:
    """The command of a run, as after `python`."""
    return ["-m", "gpt_jax", "train", *run.arguments, f"--workdir={run.workdir}"]


def run_sweep(
    runs: Sequence[PlannedRun],
    workdir: pathlib.Path,
    *,
    processes: int = 1,
    ledger: pathlib.Path | None = None,
    command: Callable[[PlannedRun], list[str]] = train_command,
    say: Callable[[str], None] = print,
) -> int:
    """Runs what is missing and continues what broke, until nothing is left or a signal stops it.

    A run that fails is named, and the others go on; the ledger is written after each.

    Args:
      runs: Of plan_sweep.
      workdir: The sweep's directory.
      processes: How many runs at a time; each then has its share of the cores.
      ledger: A file that the ledger is written to beside the one in `workdir`.
      command: What to start for a run.
      say: Takes the lines for people.

    Returns:
      ALL_DONE (a run that diverged is done too), SOME_FAILED, or INTERRUPTED: the runs under way
      were asked to save, and did.

    Raises:
      ValueError: `processes` is below 1, another sweep is at work in `workdir`, or another run is
        finished where one of these belongs.
    """
    if processes < 1:
        raise ValueError(f"--processes: {processes} is not at least 1")
    if (workdir / "config.json").exists():
        raise ValueError(f"--workdir: {str(workdir)!r} is a run; give a folder for the sweep")
    with _locked(workdir), Interrupts() as interrupts:
        runner = _Runner(runs, workdir, processes, ledger, command, say)
        try:
            while runner.go_on(interrupts.requested):
                time.sleep(_TICK)
        finally:
            runner.kill()
    return runner.end(bool(interrupts.requested))


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "a") as file:
        if not _try_lock(file):
            raise ValueError(f"--workdir: {str(workdir)!r} is in use by another sweep")
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Child:
    """A run under way, and the share of the machine that it has."""

    run: PlannedRun
    process: warm.Process
    slot: int
    since: float


class _Runner:
    """What is done, what is under way and what waits."""

    def __init__(self, runs, workdir, processes, ledger, command, say):
        self._workdir, self._command, self._say = workdir, command, say
        self._ledgers = [workdir / LEDGER, *([ledger] if ledger else [])]
        self._number = {run.name: i for i, run in enumerate(runs, start=1)}
        self._rows: dict[str, dict[str, Any]] = old_rows(workdir)
        self._waiting: list[PlannedRun] = []
        self._children: list[_Child] = []
        self._cores = _shares(processes)
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._broken_off: set[str] = set()  # asked by someone to save and stop
        self._held: set[str] = set()  # those of which was said that another process is at them
        self._told = False
        for run in runs:
            row = self._record(run)
            if not is_done(run, row):
                self._waiting.append(run)
            elif row["status"] == FINISHED:
                self._finished.add(run.name)
            else:
                say(f"{run.name}: diverged before; remove its folder to try again")
        say(f"runs, logs and {LEDGER}: {workdir}")
        if done := len(runs) - len(self._waiting):
            say(f"{done} of {len(runs)} runs are done")
        self._write()
        self._write_state()

    def go_on(self, stop: str | None) -> bool:
        """Settles what has ended and starts what can start; whether anything is left."""
        for child in [child for child in self._children if child.process.exitcode is not None]:
            self._children.remove(child)
            self._settle(child, bool(stop))
        if stop and not self._told:
            self._told = True
            if self._children:
                self._say(f"{stop}: waiting for {len(self._children)} runs to save")
            for child in self._children:
                child.process.terminate()
        if stop:
            return bool(self._children)
        while len(self._children) < len(self._cores) and (run := self._next()):
            self._start(run)
        if self._waiting and not self._children and not self._held:
            for run in self._waiting:  # what they need has failed
                missing = ", ".join(name for name in run.needs if name not in self._finished)
                self._say(f"{run.name}: not run, as it needs {missing}")
            self._failed |= {run.name for run in self._waiting}
            self._waiting = []
            self._write_state()
        return bool(self._children or self._waiting)

    def _next(self) -> PlannedRun | None:
        """The first run that can start; of those that another process is at none can."""
        self._held &= {run.name for run in self._waiting}
        for run in self._waiting:
            if not self._finished.issuperset(run.needs):
                continue
            if not _is_in_use(run.workdir):
                self._held.discard(run.name)
                self._waiting.remove(run)
                return run
            if run.name not in self._held:
                self._held.add(run.name)
                self._say(f"{run.name}: waits, another process is at it")
        return None

    def _start(self, run: PlannedRun) -> None:
        taken = {child.slot for child in self._children}
        slot = next(i for i in range(len(self._cores)) if i not in taken)
        process = warm.start(self._command(run), log=log_path(run), cores=self._cores[slot])
        self._children.append(_Child(run, process, slot, time.monotonic()))
        number = f"{self._number[run.name]} of {len(self._number)}"
        self._say(f"{run.name}: begins ({number})")
        self._write_state()

    def _settle(self, child: _Child, stopping: bool) -> None:
        run, code = child.run, child.process.exitcode
        stopped = code == INTERRUPTED or (stopping and code < 0)
        row = self._record(run, failed=not stopped)
        took, status = clock(time.monotonic() - child.since), row["status"] if row else FAILED
        if status == FINISHED:
            self._finished.add(run.name)
            loss = "" if row["loss"] is None else f", validation loss {row['loss']:.4f}"
            self._say(f"{run.name}: finished in {took}{loss}")
        elif status == DIVERGED:
            self._say(f"{run.name}: diverged: {last_line(log_path(run))}")
        elif stopped:
            self._broken_off.add(run.name)
            self._say(f"{run.name}: interrupted: {last_line(log_path(run))}")
        else:
            self._failed.add(run.name)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            line = last_line(log_path(run))
            self._say(f"{run.name}: FAILED ({how}): {line}; log: {log_path(run)}")
        self._write_state()
        self._write()

    def _record(self, run: PlannedRun, *, failed: bool = False) -> dict[str, Any] | None:
        """The run's row, as of now, for the ledger."""
        row = row_of(run, failed=failed)
        self._rows.pop(run.name, None)
        if row is not None:
            self._rows[run.name] = row
        return row

    def _write(self) -> None:
        for path in self._ledgers:
            write_ledger(path, self._rows.values())

    def _write_state(self) -> None:
        """For `--status`: who is at what."""
        running = {child.run.name: child.process.pid for child in self._children}
        state = {"running": running, "failed": sorted(self._failed)}
        partial = self._workdir / f"{STATE}.partial"
        partial.write_text(json.dumps(state))
        partial.replace(self._workdir / STATE)

    def kill(self) -> None:
        """Ends what is still under way, where an error or a second Ctrl-C ended the sweep."""
        for child in self._children:
            child.process.kill()
            child.process.join()

    def end(self, interrupted: bool) -> int:
        """Says what became of all, and returns the exit code."""
        left = len(self._waiting) + len(self._broken_off)
        if interrupted and left:
            self._say(f"interrupted, {left} runs are left; the same command continues")
            return INTERRUPTED
        names = ", ".join(sorted(self._failed))
        if self._failed:
            self._say(f"{len(self._failed)} of {len(self._number)} runs failed: {names}")
            return SOME_FAILED
        if left:
            self._say(f"{left} runs were interrupted; the same command continues")
            return INTERRUPTED
        wild = [name for name in self._number if self._rows[name]["status"] == DIVERGED]
        shown = f", {len(wild)} of them diverged: {', '.join(wild)}" if wild else ""
        self._say(f"{len(self._number)} runs are done{shown}")
        return ALL_DONE


def _shares(processes: int) -> list[set[int] | None]:
    """The cores of each process; None: any."""
    if processes == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    cores = sorted(os.sched_getaffinity(0))
    bounds = [i * len(cores) // processes for i in range(processes + 1)]
    return [
        set(cores[low:high]) or {cores[low % len(cores)]}
        for low, high in itertools.pairwise(bounds)
    ]


def _is_in_use(workdir: pathlib.Path) -> bool:
    """Whether a process is at the run: one that a killed sweep left behind, or a person's own."""
    try:
        with open(workdir / LOCK, "a") as file:
            return not _try_lock(file)
    except FileNotFoundError:  # no such folder yet
        return False
