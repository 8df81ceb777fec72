"""A run that hangs is ended, and it says where."""

import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from test_policies import config_for

from gpt_jax.runs import goodput
from gpt_jax.runs.events import FILE, EventLog, Phases, read_events
from gpt_jax.train.watchdog import STALLED, Watchdog


def watch(tmp_path, phases, timeout):
    log, left = EventLog(tmp_path / FILE, phases, 0), []
    return log, left, Watchdog(phases, timeout, tmp_path, log, 3, leave=left.append)


def test_a_phase_that_lasts_is_named_with_all_stacks(tmp_path, capsys):
    phases = Phases()
    phases.enter("data_wait")
    log, left, watchdog = watch(tmp_path, phases, 0.3)
    waiting = threading.Event()

    def where_another_thread_hangs():
        waiting.wait(30)

    thread = threading.Thread(target=where_another_thread_hangs)
    thread.start()
    began = time.monotonic()
    with watchdog:
        while not left and time.monotonic() - began < 20:
            time.sleep(0.01)
    waiting.set()
    thread.join()
    log.close()
    assert left == [STALLED]
    told = capsys.readouterr().err
    assert "process 3 on " in told and "'data_wait'" in told
    stacks = (tmp_path / "stacks-3.txt").read_text()
    assert stacks.startswith("data_wait for") and "where_another_thread_hangs" in stacks
    assert "test_a_phase_that_lasts" in stacks
    (event,) = (row for row in read_events(tmp_path / FILE) if row["kind"] == "stalled")
    assert event["phase_of_stall"] == "data_wait" and event["seconds_of_stall"] > 0.3
    assert goodput.goodput(tmp_path)["stalled"] == pytest.approx(event["seconds_of_stall"], rel=0.2)


def test_two_thousand_clean_steps_are_no_alarm(tmp_path):
    phases = Phases()
    log, left, watchdog = watch(tmp_path, phases, 2.0)
    with watchdog:
        for _ in range(2000):
            phases.enter("data_wait")
            phases.enter("step")
            time.sleep(0.001)
    log.close()
    assert not left and not list(tmp_path.glob("stacks*"))


def test_zero_watches_nothing(tmp_path):
    log, left, watchdog = watch(tmp_path, Phases(), 0.0)
    with watchdog:
        time.sleep(0.05)
    log.close()
    assert not left


_HANGING = """
import sys, time, jax
sys.path[:0] = ["tests"]
from test_policies import config_for
from gpt_jax.train import loop
from gpt_jax.train.setup import set_up

class Batches:
    def __init__(self, *arguments):
        self._inner, self._left = whole(*arguments), 3
    def __next__(self):
        self._left -= 1
        if self._left < 0:
            time.sleep(600)
        return next(self._inner)

whole, loop.train_batches = loop.train_batches, Batches
corpus, workdir, cache = sys.argv[1:]
config = config_for(corpus, "train.stall_timeout=20")
loop.fit(set_up(config, workdir, cache, jax.devices()[:1]))
"""


@pytest.mark.slow
def test_a_run_whose_data_hang_ends_with_70(corpus, cache_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _HANGING, corpus, tmp_path / "run", cache_dir], cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == STALLED, done.stderr
    assert "'data_wait'" in done.stderr
    assert "__next__" in (tmp_path / "run" / "stacks-0.txt").read_text()
    assert goodput.goodput(tmp_path / "run")["stalled"] > 20


def test_the_field_is_checked(corpus):
    with pytest.raises(ValueError, match=r"train.stall_timeout: -1.0 is not 0 or above"):
        config_for(corpus, "train.stall_timeout=-1")
