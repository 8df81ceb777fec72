"""Where the runs of a sweep stand, how long the rest takes, and both in words.  Starts no JAX."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.launch.sweeps import LEDGER, STATE, PlannedRun, power, short
from gpt_jax.parallel.cache_folder import cache_dir
from gpt_jax.runs.identity import config_sha
from gpt_jax.runs.ledger import (
    DIVERGED,
    FAILED,
    FINISHED,
    UNFINISHED,
    last_loss,
    ledger_row,
    read_ledger,
    run_steps,
)
from gpt_jax.runs.metrics import read_rows

TO_RUN, RUNNING = "to run", "running"
# Before anything was measured: a small model's share of the roof, and seconds to start and end.
_GUESSED_MFU, _GUESSED_START = 0.08, 20.0


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a finished run tells of the time of others.

    Attributes:
      num_params: Its parameters.
      flops_per_sec: Of its steps.
      overhead: Seconds beside them: start, compilation, evaluations, checkpoints.
    """

    num_params: int
    flops_per_sec: float
    overhead: float


def row_of(run: PlannedRun, *, failed: bool = False) -> dict[str, Any] | None:
    """The run's row for the ledger; None: it has not begun."""
    if not (run.workdir / "config.json").exists():
        return None
    return ledger_row(run.workdir, group=run.group, overrides=run.overrides, failed=failed)


def is_done(run: PlannedRun, row: Mapping[str, Any] | None) -> bool:
    """Whether there is nothing to do: finished, or diverged with this config.

    Raises:
      ValueError: What is finished there is another run; names the first field that differs.
    """
    if row is None or row["status"] not in (FINISHED, DIVERGED):
        return False
    if row["config_sha"] == config_sha(run.config):
        whole = run.num_tokens in (None, row["num_tokens"]) or run.config.train.patience
        return row["status"] == DIVERGED or bool(whole)
    from gpt_jax.train.workdir import check_workdir  # starts JAX; seldom needed

    check_workdir(run.workdir, run.config)
    old = json.loads((run.workdir / "config.json").read_text())
    same_length = old["train"]["duration"] == run.config.train.duration
    return row["status"] == FINISHED and same_length


def old_rows(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Rows of the sweep directory's ledger by name, of runs that are still there."""
    path = workdir / LEDGER
    rows = read_ledger(path) if path.exists() else []
    return {row["name"]: row for row in rows if (workdir / row["name"]).exists()}


def read_state(workdir: pathlib.Path) -> tuple[set[str], set[str]]:
    """Names of the runs that a sweep is at, and of those that failed when it was last there."""
    try:
        state = json.loads((workdir / STATE).read_text())
    except (FileNotFoundError, ValueError):
        return set(), set()
    running = {name for name, pid in state["running"].items() if _is_alive(pid)}
    return running, set(state["failed"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def rates(rows: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> list[Rate]:
    """What the finished runs among the rows tell of time."""
    found = []
    for row in rows:
        if row["status"] != FINISHED or not row["tokens_per_sec"]:
            continue
        steps = row["num_tokens"] / row["tokens_per_sec"]
        overhead = max(0.0, _wall_seconds(workdir / row["name"]) - steps)
        found.append(Rate(row["num_params"], row["flops"] / steps, overhead))
    return found


def _wall_seconds(workdir: pathlib.Path) -> float:
    """From the start of a run to its last row; nan where it was continued."""
    sessions = json.loads((workdir / "receipt.json").read_text())["sessions"]
    rows = read_rows(workdir / "metrics.jsonl")
    if len(sessions) > 1 or not rows:
        return math.nan
    return rows[-1]["time"] - datetime.datetime.fromisoformat(sessions[0]["started"]).timestamp()


def estimate(run: PlannedRun, row: Mapping[str, Any] | None, known: Sequence[Rate]) -> float | None:
    """Seconds that a run still takes, by the finished run whose size is nearest; None: not known.

    Where none is finished: by the roof that was measured on this machine, a rough guess.
    """
    if run.flops is None:
        return None
    left = run.flops * (1 - (row["num_tokens"] / run.num_tokens if row else 0))
    if known:
        nearest = min(known, key=lambda x: abs(math.log(x.num_params / run.num_params)))
        overheads = [x.overhead for x in known if not math.isnan(x.overhead)]
        usual = statistics.median(overheads) if overheads else _GUESSED_START
        overhead = usual if math.isnan(nearest.overhead) else nearest.overhead
        return left / nearest.flops_per_sec + overhead
    roof = _roof()
    return None if roof is None else left / (_GUESSED_MFU * roof) + _GUESSED_START


def _roof() -> float | None:
    """FLOP/s that were measured on this machine, of whatever dtype; see parallel/peaks.py."""
    try:
        kept = json.loads((cache_dir() / "roof.json").read_text())
        return statistics.median(map(float, kept.values()))
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged
        return None


def table(runs: Sequence[PlannedRun], workdir: pathlib.Path, processes: int) -> list[str]:
    """The runs in columns, and a last line with the sum."""
    rows, states = _standing(runs, workdir)
    known = rates([*filter(None, rows.values())], workdir)
    lines = [("name", "params", "tokens", "FLOPs", "steps", "time left", "status")]
    times = []
    for run in runs:
        done = states[run.name] in (FINISHED, DIVERGED)
        time = 0.0 if done else estimate(run, rows[run.name], known)
        times.append(time)
        tokens = run.config.train.duration if run.num_tokens is None else short(run.num_tokens)
        flops = "?" if run.flops is None else power(run.flops, 2)
        steps = "?" if run.steps is None else f"{run.steps:,}"
        shown = "" if done else clock(time)
        size = f"{run.num_params:,}"
        lines.append((run.name, size, str(tokens), flops, steps, shown, states[run.name]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i in (0, 6) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    total = power(sum(run.flops or 0 for run in runs), 2)
    source = "by the rates of finished runs" if known else "a guess: no run is finished"
    left = _sum(times, processes)
    return [*text, f"{_counts(states)}; {total} FLOPs; about {clock(left)} left ({source})"]


def status(runs: Sequence[PlannedRun], workdir: pathlib.Path, processes: int) -> list[str]:
    """Counts, and a line for each run that is running, failed or diverged."""
    rows, states = _standing(runs, workdir)
    known = rates([*filter(None, rows.values())], workdir)
    lines, times = [], []
    for run in runs:
        state, row = states[run.name], rows[run.name]
        if state in (FINISHED, DIVERGED):
            times.append(0.0)
        elif state == RUNNING and row is not None:
            step, total = run_steps(run.workdir)
            total = total or run.steps
            time = estimate(run, {**row, "num_tokens": step * _tokens(run)}, known)
            times.append(time)
            loss = last_loss(run.workdir)
            shown = "" if loss is None else f", loss {loss:.4f}"
            lines.append(f"running   {run.name}: step {step} of {total}{shown}, {clock(time)} left")
        else:
            times.append(estimate(run, row, known))
        if state in (FAILED, DIVERGED):
            lines.append(f"{state:8}  {run.name}: {last_line(log_path(run))}")
    return [f"{_counts(states)}; about {clock(_sum(times, processes))} left", *lines]


def _tokens(run: PlannedRun) -> int:
    return run.config.train.batch_size * run.config.data.seq_len


def _standing(
    runs: Sequence[PlannedRun], workdir: pathlib.Path
) -> tuple[dict[str, dict[str, Any] | None], dict[str, str]]:
    """The rows and the states of the runs, by name."""
    running, failed = read_state(workdir)
    rows, states = {}, {}
    for run in runs:
        row = rows[run.name] = row_of(run)
        if run.name in running:
            states[run.name] = RUNNING
        elif is_done(run, row):
            states[run.name] = row["status"]
        elif run.name in failed:
            states[run.name] = FAILED
        else:
            states[run.name] = UNFINISHED if row else TO_RUN
    return rows, states


def _counts(states: Mapping[str, str]) -> str:
    counts = {state: list(states.values()).count(state) for state in (FINISHED, RUNNING, FAILED)}
    rest = [state for state in states.values() if state not in counts]
    words = [f"{number} {state}" for state, number in counts.items()]
    words += [f"{rest.count(state)} {state}" for state in dict.fromkeys(rest)]
    return f"{len(states)} runs: " + ", ".join(words)


def _sum(times: Sequence[float | None], processes: int) -> float | None:
    """Seconds of all of them together, at least those of the longest; None: one is not known."""
    if any(time is None for time in times):
        return None
    return max([sum(times) / processes, *times])


def clock(seconds: float | None) -> str:
    """1:02:03, or ? where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def log_path(run: PlannedRun) -> pathlib.Path:
    """Where the run's command writes what it says."""
    return run.workdir.with_name(f"{run.name}.log")


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that says something."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
