"""How much of a run's time was training that counts, from its own events.  Starts no JAX."""

import os
from typing import Any

from gpt_jax.runs.events import FILE, PHASES, read_events

# Done again if the run goes on from an earlier step.
_WORK = ("data_wait", "step", "evaluate", "save_wait")


def goodput(workdir: os.PathLike) -> dict[str, float]:
    """Seconds by category, of all sessions of a run; their sum is the sessions' wall time.

    The categories are the phases of runs/events.py. What was done behind the checkpoint that a
    later session, or a rewind, went on from is "lost", whatever it was.

    Raises:
      ValueError: There are no events.
    """
    path = os.path.join(workdir, FILE)
    if not os.path.exists(path):
        raise ValueError(f"--run: {os.fspath(workdir)!r} has no {FILE}")
    return _by_category(read_events(path))


def _by_category(events: list[dict[str, Any]]) -> dict[str, float]:
    seconds = dict.fromkeys(PHASES, 0.0)
    done: list[dict[str, Any]] = []  # work that counts so far
    for event in events:
        if event["kind"] in ("begin", "rewind"):
            seconds["lost"] += sum(x["seconds"] for x in done if x["step"] > event["start_step"])
            done = [x for x in done if x["step"] <= event["start_step"]]
        elif event["kind"] == "phase" and event["phase"] in _WORK:
            done.append(event)
        elif event["kind"] == "phase":
            seconds[event["phase"]] += event["seconds"]
    for event in done:
        seconds[event["phase"]] += event["seconds"]
    return seconds


def in_words(seconds: dict[str, float]) -> str:
    """Shares of the whole, the largest first: "step 91%, evaluate 6%, compile 3%"."""
    whole = sum(seconds.values()) or 1.0
    shares = sorted(((100 * x / whole, name) for name, x in seconds.items()), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {x:.0f}%" for x, name in shares if x >= 0.5)
