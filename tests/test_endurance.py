"""A run of 200 steps, killed, interrupted, stalled and starved: it is the run that nobody touched.

`pytest -m slow tests/test_endurance.py -s` also prints the figures that docs/reliability.md gives.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from conftest import ROOT
from endurance_child import POINTS, train

from gpt_jax import trees
from gpt_jax.runs.checkpoint_reader import CheckpointReader
from gpt_jax.runs.events import FILE, read_events
from gpt_jax.runs.goodput import goodput, in_words
from gpt_jax.runs.metrics import VOLATILE, read_rows
from gpt_jax.runs.quarantine import CheckpointWarning
from gpt_jax.runs.run import open_run
from gpt_jax.train.loop import FINISHED, INTERRUPTED
from gpt_jax.train.watchdog import STALLED

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 200, 7
OVERRIDES = (
    "data.tokenizer=bytes", "model.vocab_size=320", "model.seq_len=32", "data.seq_len=32",
    "model.dropout=0.1", "train.batch_size=4", "train.num_microbatches=2",
    f"train.duration={STEPS}", "train.log_every=1", "train.eval_every=25",
    "train.eval_batches=2", "train.sample_prompts=()",
    f"train.checkpoint_every={SAVE_EVERY} steps", "train.tensorboard=false",
)  # fmt: skip
# One program imports everything once, and is copied for each run that is to be killed.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["gpt_jax.cli.train", "gpt_jax.train.loop", "gpt_jax.train.reproduce", "matplotlib.pyplot"]
)
CORES = os.sched_getaffinity(0)
_LONG = 900  # seconds in which a child must have ended


@pytest.fixture(scope="module")
def start(corpus, cache_dir):
    """Starts a run, or continues it: start(workdir, plan, further overrides) is its process."""

    def started(workdir, plan=None, overrides=()):
        words = ["train", "--config=configs/gpt.py:size=100k", f"--workdir={workdir}"]
        words += [f"--config.{x}" for x in (f"data.path={corpus}", *OVERRIDES, *overrides)]
        process = FORKS.Process(
            target=train, args=(words, str(workdir), str(cache_dir), CORES, plan), daemon=True
        )
        os.chdir(ROOT)
        process.start()
        return process

    return started


def ended(process, workdir):
    """The exit code: minus the signal, if one ended it."""
    process.join(_LONG)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"it did not end: {said(workdir)}")
    return process.exitcode


def said(workdir):
    with open(f"{workdir}.log") as file:
        return file.read()


def rows_of(workdir):
    """Rows without times and speeds."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def sha_of(workdir):
    """sha256 of the final parameters, and their step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        run = open_run(workdir)
    sha = hashlib.sha256()
    for name, leaf in sorted(trees.flatten(run.params).items()):
        sha.update(name.encode() + np.asarray(leaf).tobytes())
    return sha.hexdigest(), run.step


def leaves_of(workdir):
    """{step: digests of all leaves} of the checkpoints, the newest last; older ones may be half
    deleted."""
    reader, found = CheckpointReader(workdir / "checkpoints"), {}
    try:
        for step in reader.steps():
            try:
                found[step] = reader.manifest(step)["leaves"]
            except ValueError:
                assert step != reader.steps()[-1]
    finally:
        reader.close()
    return found


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nothing disturbs: (folder, rows, sha256, leaves of all steps)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert ended(start(workdir, None, ["train.keep=1000"]), workdir) == FINISHED, said(workdir)
    return workdir, rows_of(workdir), sha_of(workdir), leaves_of(workdir)


@pytest.fixture(scope="module")
def patience(whole):
    """Seconds in one phase that are no hang: well above what a whole run had, compiling too."""
    return round(5 + 2 * max(row.get("seconds", 0) for row in read_events(whole[0] / FILE)))


def assert_is_whole(workdir, whole):
    """Rows and final parameters are the same, no row is missing and none is twice."""
    _, rows, sha, _ = whole
    ours = rows_of(workdir)
    steps = [row["step"] for row in ours if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert ours == rows
    assert sha_of(workdir) == sha


def assert_is_on_the_way(workdir, whole):
    """What a killed process left: a beginning of the rows, and checkpoints that are the run's.

    Returns:
      Steps that it had done and will do again.
    """
    _, rows, _, leaves = whole
    ours = rows_of(workdir) if (workdir / "metrics.jsonl").exists() else []
    assert ours == rows[: len(ours)]
    saved = leaves_of(workdir) if (workdir / "checkpoints").exists() else {}
    for step, found in saved.items():
        if step in leaves:  # a step of the schedule
            assert found == leaves[step], step
    done = max((row["step"] for row in ours), default=0)
    return max(0, done - max(saved, default=0))


class Rows:
    """Follows the rows of a run that is under way; those that an earlier process left are not."""

    def __init__(self, workdir):
        self._path = workdir / "metrics.jsonl"
        self._left = self._path.stat().st_ino if self._path.exists() else None

    def wait_for(self, process, step):
        """Returns when the row of a step is written, or the process has ended."""
        while process.is_alive() and self._last() < step:
            time.sleep(0.01)

    def _last(self):
        if not self._path.exists() or self._path.stat().st_ino == self._left:
            return -1
        lines = self._path.read_bytes().split(b"\n")
        return json.loads(lines[-2])["step"] if len(lines) > 1 else -1


def test_fifty_kills(start, whole, tmp_path):
    """Five runs, each killed ten times: at random moments, two of them inside a save."""
    rng, points = np.random.default_rng(0), list(POINTS)
    lost, in_start, began = [], 0, time.monotonic()
    for number in range(5):
        workdir = tmp_path / str(number)
        places = [*points[2 * number : 2 * number + 2], *[""] * 7, "start"]
        reached = 0
        for place in rng.permutation(places):
            rows = Rows(workdir)
            if place in POINTS:
                process = start(workdir, {"kill": (place, int(rng.integers(1, 3)))})
            else:
                process = start(workdir)
                if place != "start":
                    rows.wait_for(process, reached + int(rng.integers(1, 15)))
                time.sleep(rng.uniform(0, 3 if place == "start" else 0.15))
                process.kill()
                in_start += place == "start"
            assert ended(process, workdir) == -signal.SIGKILL, (place, said(workdir))
            lost.append(assert_is_on_the_way(workdir, whole))
            print(f"{len(lost)}: {place or 'any moment'}, {lost[-1]} steps lost", flush=True)
            found = rows_of(workdir)[-1:] if (workdir / "metrics.jsonl").exists() else []
            reached = max(0, found[0]["step"] - lost[-1]) if found else 0
        assert ended(start(workdir), workdir) == FINISHED, said(workdir)
        assert_is_whole(workdir, whole)
        print(f"time of a run killed ten times: {in_words(goodput(workdir))}")
    assert len(lost) == 50
    # The save under way may be lost, and what was done since.
    assert max(lost) <= 2 * SAVE_EVERY
    print(
        f"\n50 of 50 kills ({in_start} while starting, 10 in a save): the same rows and sha256; "
        f"steps done again: mean {np.mean(lost):.1f}, most {max(lost)}; "
        f"{time.monotonic() - began:.0f} s"
    )


def test_twenty_signals(start, whole, tmp_path):
    """SIGTERM in a step, a save, an evaluation, a wait for data and the compilation."""
    rng, seconds, began = np.random.default_rng(1), {}, time.monotonic()
    for number in range(4):
        workdir, stamp = tmp_path / str(number), tmp_path / f"{number}.stamp"
        for phase in rng.permutation(["step", "save_wait", "evaluate", "data_wait", "compile"]):
            nth = int(rng.integers(2, 12)) if phase in ("step", "data_wait") else 1
            stamp.unlink(missing_ok=True)
            plan = {"terminate": (str(phase), nth, float(rng.uniform(0, 0.1)), str(stamp))}
            process = start(workdir, plan)
            assert ended(process, workdir) == INTERRUPTED, (phase, said(workdir))
            seconds.setdefault(str(phase), []).append(time.time() - float(stamp.read_text()))
            assert_is_on_the_way(workdir, whole)
            done = max(row["step"] for row in rows_of(workdir))
            assert max(leaves_of(workdir)) == done  # nothing is lost
        assert ended(start(workdir), workdir) == FINISHED, said(workdir)
        assert_is_whole(workdir, whole)
    assert sum(map(len, seconds.values())) == 20
    told = ", ".join(f"{phase} {max(times):.1f}" for phase, times in seconds.items())
    print(
        f"\n20 of 20 signals: exit code 75, no step lost, the same rows and sha256; longest "
        f"seconds from signal to exit: {told}; {time.monotonic() - began:.0f} s"
    )


def test_a_signal_before_the_first_step(corpus, cache_dir, tmp_path):
    """Through the program's own entry, while it sets up."""
    words = [sys.executable, "-m", "gpt_jax", "train", "--config=configs/gpt.py:size=100k"]
    words += [f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.{x}" for x in (f"data.path={corpus}", *OVERRIDES)]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "GPT_JAX_CACHE": str(cache_dir)},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.startswith("run: ")
    sent = time.monotonic()
    process.terminate()
    output, _ = process.communicate(timeout=_LONG)
    print(f"\na signal while setting up: {time.monotonic() - sent:.1f} s to the exit")
    assert process.returncode == INTERRUPTED
    assert "SIGTERM: no step is under way; the same command continues" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_stalls_are_found_where_they_were(start, tmp_path):
    """Of each phase one is stalled: its entry has that length, and the sum is the wall time."""
    workdir = tmp_path / "run"
    # Which time, how long, and the step that the loop has done then. A step's own length is not
    # known to the child, so its stall is long beside it.
    planted = {
        "data_wait": (60, 4, 59), "step": (90, 12, 89), "evaluate": (5, 4, 125),
        "save_wait": (23, 4, 161),
    }  # fmt: skip
    plan = {"stall_all": [(phase, *how[:2]) for phase, how in planted.items()]}
    assert ended(start(workdir, plan), workdir) == FINISHED, said(workdir)
    events = [row for row in read_events(workdir / FILE) if row["kind"] == "phase"]
    took = dict(re.findall(r"^stalled: (\w+) ([\d.]+)$", said(workdir), re.M))
    told = []
    for phase, (_, seconds, step) in planted.items():
        ours = [row for row in events if row["phase"] == phase]
        there = max(
            (row for row in ours if 0 <= row["step"] - step <= 2), key=lambda row: row["seconds"]
        )
        found, real = there["seconds"], float(took[phase])
        if phase == "step":
            found -= float(np.median([row["seconds"] for row in ours]))
        assert real >= seconds and found == pytest.approx(real, rel=0.05), phase
        told.append(f"{phase} {found:.2f} of {real:.2f}")
    wall = float(said(workdir).rsplit("wall: ", 1)[1])
    seconds = goodput(workdir)
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert seconds["lost"] == seconds["stalled"] == 0
    print(
        f"\nstalls as found, seconds: {', '.join(told)}; categories sum to "
        f"{sum(seconds.values()):.2f} of {wall:.2f} s"
    )


def test_two_thousand_clean_steps_are_no_alarm(start, patience, tmp_path):
    workdir = tmp_path / "run"
    words = ["train.duration=2000", "train.checkpoint_every=500", "train.eval_every=500"]
    words += [f"train.stall_timeout={patience}", "train.log_every=10"]
    assert ended(start(workdir, None, words), workdir) == FINISHED, said(workdir)
    assert not list(workdir.glob("stacks*"))
    assert goodput(workdir)["stalled"] == 0
    longest = max(row.get("seconds", 0) for row in read_events(workdir / FILE))
    print(f"\n2,000 clean steps, no alarm over {patience} s; the longest entry: {longest:.1f} s")


@pytest.mark.parametrize("phase", ["data_wait", "step", "evaluate", "save_wait"])
def test_a_hang_in_any_phase_ends_with_70(start, patience, tmp_path, phase):
    workdir = tmp_path / "run"
    nth = {"data_wait": 30, "step": 30, "evaluate": 1, "save_wait": 4}[phase]
    process = start(workdir, {"stall": (phase, nth, 10_000)}, [f"train.stall_timeout={patience}"])
    assert ended(process, workdir) == STALLED, said(workdir)
    assert f"has been in phase {phase!r}" in said(workdir)
    stacks = (workdir / "stacks-0.txt").read_text()
    assert stacks.startswith(f"{phase} for") and "endurance_child.py" in stacks
    assert goodput(workdir)["stalled"] == pytest.approx(patience, rel=0.2, abs=4)


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_saves_and_no_row(start, whole, tmp_path):
    """Two saves find no place; the third has it again."""
    disk = tmp_path / "disk"
    with small_disk(disk, 64 << 20):
        workdir = disk / "run"
        plan = {"fill_disk": (str(disk / "filler"), 300_000, 10, 12)}
        assert ended(start(workdir, plan), workdir) == FINISHED, said(workdir)
        output = said(workdir)
        for step, good in ((70, 63), (77, 63)):
            assert f"checkpoint {step}: was not saved" in output
            assert f"the last good step is {good}" in output
        assert "are free" in output and "checkpoint 84" not in output
        assert_is_whole(workdir, whole)
        assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_it_is_reproduced_on_this_machine(whole, cache_dir, tmp_path):
    words = ["reproduce", f"--run={whole[0]}", f"--workdir={tmp_path / 'again'}"]
    process = FORKS.Process(
        target=train, args=(words, str(tmp_path / "again"), str(cache_dir), CORES), daemon=True
    )
    process.start()
    assert ended(process, tmp_path / "again") == 0, said(tmp_path / "again")
    assert f"equal: bit for bit in {len(whole[1])} rows up to step {STEPS}" in said(
        tmp_path / "again"
    )
