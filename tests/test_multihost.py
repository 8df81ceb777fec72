"""Several real processes on loopback, broken in every way; the fast ones are in test_distributed.

Each test says what it counts in a line of its own: `pytest -m slow -s tests/test_multihost.py`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from multihost_fixtures import (
    Group,
    config_for,
    receipt,
    settled,
    steps_begun_at,
)

from gpt_jax.data.pipeline import train_batches
from gpt_jax.runs.events import file_of, read_events
from gpt_jax.runs.metrics import read_rows
from gpt_jax.train.loop import fit
from gpt_jax.train.setup import set_up

pytestmark = pytest.mark.slow

KILLS = 10
CLEAN_STEPS = 2000
NAMED_WITHIN = 30.0  # seconds
DURATION = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, cache_dir):
    """A run of one process and two devices that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = config_for(corpus, f"train.duration={DURATION}")
    assert fit(set_up(config, workdir, cache_dir, jax.devices()[:2])) == 0
    return workdir


def children(parent: int) -> dict[int, int]:
    """Processes of a supervisor: number -> pid."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = (path / "stat").read_text().rsplit(")", 1)[1].split()
            words = (path / "cmdline").read_text().split("\0")
            if int(status[1]) == parent and status[0] != "Z":
                (word,) = [w for w in words if w.startswith("--process_id=")]
                found[int(word[13:])] = int(path.name)
    return found


class Supervised:
    """A supervisor of two processes, and its lines with the times they came at."""

    def __init__(self, made: Group):
        words = [sys.executable, "-m", "gpt_jax", *made.words, "--supervise"]
        words += ["--num_processes=2", "--heartbeat_timeout=10"]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=made.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def lost(self) -> list[tuple[float, str]]:
        return [entry for entry in self.lines if "was lost" in entry[1]]

    def output(self) -> str:
        return "".join(line for _, line in self.lines)


def test_a_process_that_is_killed_is_named_and_both_come_back(tmp_path, corpus, cache_dir):
    """One run, in whose every start one of the two is killed, KILLS times."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    workdir, every = tmp_path / "killed", 4
    long = (f"train.duration={20 * KILLS}", "train.eval_every=50")
    supervised = Supervised(Group(0, workdir, corpus, cache_dir, *long))
    begun = [0]
    try:
        for trial in range(KILLS):
            victim = int(rng.integers(2))
            # Behind a new checkpoint: a start that came no further would be a crash loop.
            step = begun[-1] + every + int(rng.integers(1, 4))
            wait_for(lambda: steps_begun_at(workdir) == begun, supervised)  # noqa: B023
            wait_for(lambda: newest_row(workdir) >= step, supervised)  # noqa: B023
            wait_for(lambda: newest_checkpoint(workdir) > begun[-1], supervised)  # noqa: B023
            os.kill(children(supervised.process.pid)[victim], signal.SIGKILL)
            killed = time.monotonic()
            wait_for(lambda: len(supervised.lost()) > trial, supervised)  # noqa: B023
            when, line = supervised.lost()[-1]
            assert f"process {victim} on {socket.gethostname()}" in line and "SIGKILL" in line
            assert when - killed < NAMED_WITHIN, supervised.output()
            wait_for(lambda: len(steps_begun_at(workdir)) > len(begun), supervised)  # noqa: B023
            begun = steps_begun_at(workdir)
            # It goes on from the newest checkpoint that was complete.
            assert step - 2 * every <= begun[-1] and begun[-1] % every == 0, (begun, step)
            print(
                f"\nkill {trial + 1} of {KILLS}: process {victim} after the row of step {step}, "
                f"named after {when - killed:.1f} s, went on from {begun[-1]}",
                flush=True,
            )
        assert supervised.process.wait(900) == 0, supervised.output()
    finally:
        supervised.process.terminate()
    assert len(supervised.lost()) == KILLS and len(steps_begun_at(workdir)) == KILLS + 1
    config = config_for(corpus, *long)
    assert fit(set_up(config, tmp_path / "whole", cache_dir, jax.devices()[:2])) == 0
    assert settled(workdir) == settled(tmp_path / "whole"), supervised.output()


def newest_row(workdir) -> int:
    path = workdir / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def newest_checkpoint(workdir) -> int:
    steps = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(step) for step in steps if step.isdigit()), default=0)


def wait_for(is_so, supervised: Supervised, timeout: float = 900) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert supervised.process.poll() is None, supervised.output()
        with contextlib.suppress(FileNotFoundError):
            if is_so():
                return
        time.sleep(0.02)
    raise AssertionError(supervised.output())


def test_the_survivor_ends_by_itself_and_says_who_was_lost(tmp_path, corpus, cache_dir):
    two = Group(2, tmp_path / "run", corpus, cache_dir, f"train.duration={50 * DURATION}")
    two.signal_at(3, signal.SIGKILL, process=1)
    killed = time.monotonic()
    codes = two.codes(timeout=120)
    took = time.monotonic() - killed
    # Python says it where the collective breaks off, else the runtime when the heartbeat is late.
    said = "lost process 1 on" in two.output(0) or re.search(
        r"unhealthy \(stopped sending heartbeats\):\s*1\b|task:1", two.output(0)
    )
    assert codes[1] == -signal.SIGKILL and codes[0] in (1, -signal.SIGABRT), two.outputs()
    assert said and took < NAMED_WITHIN, two.outputs()
    print(f"\nsurvivor ended with {codes[0]} after {took:.1f} s", flush=True)


_HASHES = """
import hashlib, json
from gpt_jax.parallel import sharding
place = sharding.global_batch
calls = [0]
def hashed(batch, rows, batch_size, mesh):
    if batch_size == 4 and "tokens" in batch and RECORDING[0]:
        with open(HASHES, "a") as file:
            for i, row in enumerate(rows):
                data = b"".join(batch[name][i].tobytes() for name in sorted(batch))
                entry = [int(NEXT[0]), int(row), hashlib.sha256(data).hexdigest()]
                file.write(json.dumps(entry) + chr(10))
        NEXT[0] += 1
    return place(batch, rows, batch_size, mesh)
RECORDING, NEXT = [True], [START]
sharding.global_batch = hashed
from gpt_jax.evals import validation
run = validation.Validation.run
def unrecorded(*a, **k):
    RECORDING[0] = False
    try:
        return run(*a, **k)
    finally:
        RECORDING[0] = True
validation.Validation.run = unrecorded
"""


def test_two_then_one_then_four_processes_read_the_same_batches(tmp_path, corpus, cache_dir):
    """Checkpoints of sharded parameters are read by any number of processes."""
    workdir, hashes = tmp_path / "run", tmp_path / "hashes.jsonl"
    mesh, length = ("mesh.data=1", "mesh.fsdp=-1"), 12
    for number, start, stop in ((2, 0, 4), (1, 4, 8), (4, 8, length)):
        planted = f"HASHES, START = {str(hashes)!r}, {start}" + _HASHES
        group = Group(
            number, workdir, corpus, cache_dir, *mesh, f"train.duration={stop}", planted=planted
        )
        assert group.codes(600) == [0] * number, group.outputs()
    assert steps_begun_at(workdir) == [0, 4, 8]
    config = config_for(corpus, *mesh, f"train.duration={length}")
    alone = set_up(config, tmp_path / "alone", cache_dir, jax.devices()[:1])
    batches = train_batches(alone.data.train, config.seed, 4, 0, np.arange(4))
    alone.lock.close()
    expected = {}
    for step in range(length):
        _, batch = next(batches)
        for row in range(4):
            data = b"".join(batch[name][row].tobytes() for name in sorted(batch))
            expected[step, row] = hashlib.sha256(data).hexdigest()
    read = [tuple(json.loads(line)) for line in hashes.read_text().splitlines()]
    assert {(step, row): sha for step, row, sha in read} == expected
    assert len(read) == len(expected)  # each row was read by one process alone
    print(f"\n{len(read)} rows of {length} batches by 2, 1 and 4 processes: all equal", flush=True)


_LATE = """
if PROCESS == 1:
    import time
    from gpt_jax.train import setup
    setup.prepare_run = lambda *_: time.sleep(600)
"""


def test_a_barrier_names_the_late_host_and_its_phase(tmp_path, corpus, cache_dir):
    late = Group(
        2, tmp_path / "run", corpus, cache_dir, planted=_LATE, options=["--barrier_timeout=20"]
    )
    codes = late.codes(timeout=200)
    output = late.output(0)
    assert codes[0] == 1 and codes[1] != 0, late.outputs()
    assert re.search(r"error: barrier '[^']+': waited 2\d\.\d s for process 1 on", output), output
    assert f"process 1 on {socket.gethostname()}, last in phase 'start'" in output
    assert "Traceback" not in output


# It waits for the devices first: what a host does while they compute costs nothing.
_SLOW = """
import time, jax
from gpt_jax.train import loop
whole = loop.train_batches
class Slow:
    def __init__(self, *arguments):
        self._inner, self._read = whole(*arguments), 0
    def __next__(self):
        self._read += 1
        if PROCESS == 1 and self._read > 40:
            jax.block_until_ready(jax.live_arrays())
            time.sleep(0.05)
        return next(self._inner)
loop.train_batches = Slow
"""


def stragglers(workdir):
    return [e for e in read_events(workdir / "events.jsonl") if e["kind"] == "straggler"]


def test_a_host_that_is_slower_by_50_ms_a_step_is_reported(tmp_path, corpus, cache_dir):
    """These two are the tasks of a SLURM job."""
    long = ("train.duration=100", "train.eval_every=100", "train.checkpoint_every=100 steps")
    slow = Group(2, tmp_path / "run", corpus, cache_dir, *long, planted=_SLOW, slurm=True)
    assert slow.codes(600) == [0, 0], slow.outputs()
    found = stragglers(tmp_path / "run")
    assert [(e["straggler"], e["step"] <= 40 + 20) for e in found] == [(1, True)], found
    assert f"process 1 on {socket.gethostname()} is slow: " in slow.output(0)
    print(f"\nslow from step 41 on, reported at step {found[0]['step']}: "
          f"{1000 * found[0]['seconds_more']:.0f} ms", flush=True)  # fmt: skip


def test_no_host_is_called_slow_without_cause(tmp_path, corpus, cache_dir):
    long = (
        f"train.duration={CLEAN_STEPS}", f"train.eval_every={CLEAN_STEPS}", "train.log_every=100",
        f"train.checkpoint_every={CLEAN_STEPS} steps",
    )  # fmt: skip
    clean = Group(2, tmp_path / "run", corpus, cache_dir, *long)
    assert clean.codes(1800) == [0, 0], clean.outputs()
    found = stragglers(tmp_path / "run")
    print(f"\n{CLEAN_STEPS} clean steps: {len(found)} alarms", flush=True)
    assert not found


_SIGNAL = """
import os, signal
from gpt_jax.evals.during_training import Evaluations
from gpt_jax.runs.checkpoints import Checkpoints
from gpt_jax.train import loop
def planted(owner, name, at):
    inner, calls = getattr(owner, name), [0]
    def signalled(*a, **k):
        calls[0] += 1
        if calls[0] == at and PROCESS == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*a, **k)
    setattr(owner, name, signalled)
"""


@pytest.mark.parametrize(
    ("where", "plant"),
    [
        ("step", 'planted(loop.sharding, "global_batch", 10)'),
        ("save", 'planted(Checkpoints, "save", 3)'),
        ("evaluation", 'planted(Evaluations, "run", 2)'),
    ],
)
def test_sigterm_to_one_saves_one_step_everywhere(where, plant, whole, tmp_path, corpus, cache_dir):
    workdir, length = tmp_path / "run", f"train.duration={DURATION}"
    stopped = Group(2, workdir, corpus, cache_dir, length, planted=_SIGNAL + plant)
    assert stopped.codes(600) == [75, 75], stopped.outputs()
    again = Group(2, workdir, corpus, cache_dir, length)
    assert again.codes(600) == [0, 0], again.outputs()
    ours, theirs = (steps_begun_at(workdir, process) for process in (0, 1))
    assert ours == theirs and 0 < ours[1] < DURATION
    assert f"SIGTERM: saved step {ours[1]};" in stopped.output(0)
    assert settled(workdir) == settled(whole)
    print(f"\nSIGTERM during the {where}: both saved step {ours[1]}", flush=True)


_POISON = """
from gpt_jax.train import loop
whole = loop.train_batches
class Poisoned:
    def __init__(self, *arguments):
        self._inner = whole(*arguments)
    def __next__(self):
        index, batch = next(self._inner)
        if PROCESS == 1 and index == 9:
            batch = {**batch, "loss_mask": batch["loss_mask"] * float("nan")}
        return index, batch
loop.train_batches = Poisoned
"""


@pytest.mark.parametrize("policy", ["halt", "skip", "rewind"])
def test_what_is_not_finite_in_one_process_is_dealt_with_alike(policy, tmp_path, corpus, cache_dir):
    workdir = tmp_path / "run"
    two = Group(2, workdir, corpus, cache_dir, f"train.on_nonfinite={policy}", planted=_POISON)
    assert two.codes(600) == ([1, 1] if policy == "halt" else [0, 0]), two.outputs()
    logs = [read_events(workdir / file_of(process)) for process in (0, 1)]
    went_back = [[e["start_step"] for e in log if e["kind"] == "rewind"] for log in logs]
    assert went_back == [[8] if policy == "rewind" else []] * 2
    last = settled(workdir)[-1]
    if policy == "halt":
        for process in (0, 1):
            assert "step 10: the loss or the gradient is not finite" in two.output(process)
        (session,) = receipt(workdir)["sessions"]
        assert session["first_nonfinite"] == 10
    elif policy == "skip":
        assert [r["train/skipped"] for r in settled(workdir) if "train/skipped" in r][-1] == 1
    else:
        assert last["step"] == 12
        (row,) = [r for r in settled(workdir) if r.get("event") == "rewind"]
        assert (row["step"], row["event/last_batch"]) == (8, 9)
