"""Every second of a run is in one category, and a stall is in the right one."""

import json
import time

import jax
import pytest
from test_policies import Killed, begin, config_for

from gpt_jax.runs import events, goodput
from gpt_jax.runs.metrics import read_rows
from gpt_jax.runs.run import METRICS
from gpt_jax.train import loop
from gpt_jax.train.setup import set_up


def test_planted_stalls_are_found_and_the_sum_is_the_wall_time(
    corpus, cache_dir, tmp_path, monkeypatch
):
    config = config_for(corpus, "train.eval_every=4")
    planted = {"data_wait": 0.6, "evaluate": 0.8, "save_wait": 0.7}
    under_way = []
    inside, calls = dict.fromkeys(planted, 0.0), dict.fromkeys(planted, 0)

    def stalled(phase, function):
        """The function, which sleeps once when it is called, and measures all its time."""

        def wrapped(*arguments, **named):
            if phase in under_way:  # a save settles the one before: that is one wait
                return function(*arguments, **named)
            under_way.append(phase)
            began = time.monotonic()
            calls[phase] += 1
            if calls[phase] == (5 if phase == "data_wait" else 2):
                time.sleep(planted[phase])
            result = function(*arguments, **named)
            inside[phase] += time.monotonic() - began
            under_way.pop()
            return result

        return wrapped

    began = time.monotonic()
    training = set_up(config, tmp_path / "run", cache_dir, jax.devices()[:1])
    train_batches = loop.train_batches

    class Batches:
        def __init__(self, *arguments):
            self._next = stalled("data_wait", train_batches(*arguments).__next__)

        def __next__(self):
            return self._next()

    monkeypatch.setattr(loop, "train_batches", Batches)
    monkeypatch.setattr(loop.Evaluations, "run", stalled("evaluate", loop.Evaluations.run))
    checkpoints = training.checkpoints
    for name in ("save", "settle", "wait", "close"):
        setattr(checkpoints, name, stalled("save_wait", getattr(checkpoints, name)))
    assert loop.fit(training) == loop.FINISHED
    wall = time.monotonic() - began
    seconds = goodput.goodput(tmp_path / "run")
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    for phase, expected in inside.items():
        assert seconds[phase] == pytest.approx(expected, rel=0.05, abs=0.02), phase
        assert expected > planted[phase]
    assert seconds["compile"] > 0 and seconds["step"] > 0 and seconds["start"] > 0
    assert seconds["lost"] == seconds["stalled"] == seconds["restore"] == 0
    rows = read_rows(tmp_path / "run" / METRICS)
    waits = [row["perf/data_wait"] for row in rows if "perf/data_wait" in row]
    assert max(waits) > 0.2 and all(0 <= wait <= 1 for wait in waits)


def test_stalls_by_the_clock_alone(monkeypatch):
    """The phases as the loop enters them, on a clock that only this test moves."""
    clock = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: clock[0])
    phases = events.Phases()
    clock[0] += 3
    for i in range(100):
        phases.enter("data_wait")
        clock[0] += 0.01 + (5 if i == 50 else 0)
        phases.enter("step", counts_as="step" if i % 2 else "data_wait")
        clock[0] += 0.2
        if i % 10 == 0:
            with phases.during("evaluate"):
                clock[0] += 1
    totals = phases.totals()
    assert totals["data_wait"] == pytest.approx(5 + 50 * 0.01)
    assert totals["evaluate"] == pytest.approx(10) and totals["start"] == pytest.approx(3)
    assert totals["step"] == pytest.approx(20 + 50 * 0.01)
    assert sum(totals.values()) == pytest.approx(clock[0] - 100)


def test_work_that_is_done_again_is_lost(corpus, cache_dir, tmp_path):
    config = config_for(corpus)
    with pytest.raises(Killed):
        loop.fit(begin(config, tmp_path / "run", cache_dir, set(), killed_at=8))
    before = goodput.goodput(tmp_path / "run")
    path = tmp_path / "run" / events.FILE
    with open(path, "a") as file:
        file.write('{"time": 1.0, "ki')  # killed while it wrote
    assert loop.fit(begin(config, tmp_path / "run", cache_dir, set())) == loop.FINISHED
    rows = events.read_events(path)
    assert [row["start_step"] for row in rows if row["kind"] == "begin"] == [0, 6]
    again = next(i for i, row in enumerate(rows) if row.get("start_step") == 6)
    lost = sum(
        row["seconds"] for row in rows[:again]
        if row.get("step", 0) > 6 and row["phase"] not in ("start", "restore", "compile")
    )  # fmt: skip
    seconds = goodput.goodput(tmp_path / "run")
    assert seconds["lost"] == pytest.approx(lost) and lost > 0 == before["lost"]
    assert seconds["restore"] > 0
    whole = sum(row["seconds"] for row in rows if row["kind"] == "phase")
    assert sum(seconds.values()) == pytest.approx(whole)


def test_lost_by_hand(tmp_path):
    lines = [
        {"kind": "begin", "start_step": 0},
        {"kind": "phase", "phase": "start", "seconds": 2.0, "step": 1},
        {"kind": "phase", "phase": "step", "seconds": 10.0, "step": 5},
        {"kind": "phase", "phase": "step", "seconds": 7.0, "step": 9},
        {"kind": "rewind", "start_step": 5},
        {"kind": "phase", "phase": "step", "seconds": 4.0, "step": 8},
        {"kind": "begin", "start_step": 5},
        {"kind": "phase", "phase": "evaluate", "seconds": 1.0, "step": 9},
    ]
    (tmp_path / events.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = goodput.goodput(tmp_path)
    assert {k: v for k, v in seconds.items() if v} == {
        "start": 2, "step": 10, "lost": 11, "evaluate": 1
    }  # fmt: skip
    assert goodput.in_words(seconds) == "lost 46%, step 42%, start 8%, evaluate 4%"
    with pytest.raises(ValueError, match="has no events"):
        goodput.goodput(tmp_path / "nowhere")
