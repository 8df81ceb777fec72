"""The supervisor: crashes are started again, what cannot get on is not. Commands are stubs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from gpt_jax.launch.supervisor import supervise

# Counts its starts and does what the plan says of this one: the code to end with, and the step to
# save before. A negative code is a signal.
_STUB = """
import json, os, pathlib, sys, time
workdir, plan = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
starts = workdir / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
does = plan[min(number, len(plan) - 1)]
if "saves" in does:
    (workdir / "checkpoints" / str(does["saves"])).mkdir(parents=True)
if "receipt" in does:
    (workdir / "receipt.json").write_text(json.dumps({"sessions": does["receipt"]}))
if does["code"] < 0:
    os.kill(os.getpid(), -does["code"])
    time.sleep(60)
sys.exit(does["code"])
"""


def run(workdir, *plan):
    """(exit code, starts, seconds waited between them, lines)."""
    command = [sys.executable, "-S", "-c", _STUB, str(workdir), json.dumps(plan)]
    waits, lines = [], []
    code = supervise(command, workdir, say=lines.append, sleep=waits.append)
    return code, len((workdir / "starts").read_text()), waits, lines


def test_crashes_are_started_again_until_it_is_finished(tmp_path):
    plan = ({"code": 1, "saves": 3}, {"code": -signal.SIGKILL, "saves": 6}, {"code": 0})
    code, starts, waits, lines = run(tmp_path, *plan)
    assert (code, starts) == (0, 3)
    assert waits == [1.0, 1.0]  # it got on, so the wait is short again
    assert "exit code 1; the newest checkpoint is 3" in lines[0] and "SIGKILL" in lines[1]


def test_a_crash_loop_is_told_after_growing_waits(tmp_path):
    code, starts, waits, lines = run(tmp_path, {"code": 1, "saves": 3}, {"code": 70})
    assert (code, starts) == (1, 3)
    assert sum(waits) == 1 + 2
    assert "3 starts in a row came no further" in lines[-1] and "exit code 70" in lines[-1]
    assert "the newest checkpoint is 3" in lines[-1]


def test_without_any_checkpoint_it_is_a_crash_loop_too(tmp_path):
    code, starts, _, lines = run(tmp_path, {"code": -signal.SIGABRT})
    assert (code, starts) == (1, 3)
    assert "SIGABRT" in lines[-1] and "no step is saved" in lines[-1]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_these_are_not_started_again(tmp_path, code):
    assert run(tmp_path, {"code": code}) == (code, 1, [], [])


def test_a_halt_is_not_started_again_but_an_old_one_does_not_count(tmp_path):
    halted = [{"first_nonfinite": 7}]
    (tmp_path / "receipt.json").write_text(json.dumps({"sessions": halted}))
    plan = ({"code": 1, "saves": 3}, {"code": 1, "receipt": [*halted, {"first_nonfinite": 9}]})
    code, starts, _, lines = run(tmp_path, *plan)
    assert (code, starts) == (1, 2)
    assert "halted at step 9" in lines[-1]


_WAITS = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(workdir / "pid").write_text(str(__import__("os").getpid()))
time.sleep(60)
"""
_SUPERVISES = """
import pathlib, sys
from gpt_jax.launch.supervisor import supervise
command = [sys.executable, "-S", "-c", sys.argv[2], sys.argv[1]]
sys.exit(supervise(command, pathlib.Path(sys.argv[1])))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_run(tmp_path, number):
    command = [sys.executable, "-c", _SUPERVISES, str(tmp_path), _WAITS]
    supervisor = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline, path = time.monotonic() + 60, tmp_path / "pid"
        while time.monotonic() < deadline and not (path.exists() and path.read_text()):
            time.sleep(0.02)
        child = int(path.read_text())
        supervisor.send_signal(number)
        code = supervisor.wait(60)
        assert code == (-number if number == signal.SIGKILL else 75)
        while time.monotonic() < deadline and _is_alive(child):
            time.sleep(0.02)
        assert not _is_alive(child)  # also when the supervisor was killed
    finally:
        supervisor.kill()


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


_STARTS = """
import time
from gpt_jax.train.interrupts import Interrupts, leaving_on_sigterm
with leaving_on_sigterm():
    with Interrupts() as interrupts:
        print("in the loop", flush=True)
        while not interrupts.requested:
            time.sleep(0.01)
    print("before the loop", flush=True)
    try:
        time.sleep(60)
    finally:
        print("waited", flush=True)
"""


def test_before_the_loop_a_signal_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", _STARTS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in the loop\n"
    process.terminate()  # the loop's own handler
    assert process.stdout.readline() == "before the loop\n"
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert output == "SIGTERM: no step is under way; the same command continues\n"


def test_the_command_line_hands_on_what_it_was_given(tmp_path):
    """A user's mistake comes from the run itself, once."""
    words = ["--supervise", "--config=configs/gpt.py:size=100k,debug", f"--workdir={tmp_path}"]
    words += ["--config.train.on_nonfinite=stop"]
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", "train", *words], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("train.on_nonfinite: 'stop' is not one of") == 1
    assert "supervisor" not in done.stdout
