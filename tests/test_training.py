"""A run is the same run however often it is killed, and nothing saved is ever lost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.metrics import VOLATILE, MetricsLog, read_rows
from gpt_jax.runs.quarantine import CheckpointWarning
from gpt_jax.runs.run import open_run
from gpt_jax.train.loop import FINISHED, NonFiniteError, fit
from gpt_jax.train.setup import set_up

OVERRIDES = (
    "model.dropout=0.1",
    "train.num_microbatches=2",
    "train.duration=40",
    "train.log_every=1",
    "train.eval_every=8",
    "train.eval_batches=2",
    "train.checkpoint_every=7 steps",
    "train.sample_tokens=4",
    "train.tensorboard=false",
)


def settled(rows):
    """Rows without what differs between equal runs."""
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def command(workdir, corpus):
    words = [sys.executable, "-m", "gpt_jax", "train", "--config=configs/gpt.py:size=100k,debug"]
    words += [f"--workdir={workdir}", f"--config.data.path={corpus}"]
    return words + [f"--config.{override}" for override in OVERRIDES]


def start(workdir, corpus, cache_dir):
    return subprocess.Popen(
        command(workdir, corpus), cwd=ROOT, env={**os.environ, "GPT_JAX_CACHE": str(cache_dir)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def signal_at(process, workdir, step, number):
    """Sends the signal once the run has written the row of a step, wherever it then is.

    Rows that an earlier process left do not count: on starting, the file is replaced.
    """
    deadline, path = time.monotonic() + 300, workdir / "metrics.jsonl"
    left = path.stat().st_ino if path.exists() else None
    while time.monotonic() < deadline and process.poll() is None:
        started = path.exists() and path.stat().st_ino != left
        if started and any(row["step"] >= step for row in read_rows(path)):
            process.send_signal(number)
            break
        time.sleep(0.001)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus, cache_dir):
    """The workdir of a run that nothing disturbed, through the program's real entry point."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    output, _ = (process := start(workdir, corpus, cache_dir)).communicate(timeout=300)
    assert process.returncode == FINISHED, output
    return workdir


def test_killed_and_interrupted_equals_uninterrupted(uninterrupted, tmp_path, corpus, cache_dir):
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    workdir = tmp_path / "broken"
    kill, stop = int(rng.integers(1, 20)), int(rng.integers(20, 40))
    code, output = signal_at(start(workdir, corpus, cache_dir), workdir, kill, signal.SIGKILL)
    assert code == -signal.SIGKILL, (seed, output)
    code, output = signal_at(start(workdir, corpus, cache_dir), workdir, stop, signal.SIGTERM)
    # It may have reached the end before the signal.
    assert code in (75, FINISHED), (seed, output)
    assert "the same command continues" in output or code == FINISHED
    output, _ = (process := start(workdir, corpus, cache_dir)).communicate(timeout=300)
    assert process.returncode == FINISHED, (seed, output)

    for name in ("metrics.jsonl", "samples.jsonl"):
        rows, expected = (settled(read_rows(d / name)) for d in (workdir, uninterrupted))
        assert rows == expected, (seed, name)
    steps = [row["step"] for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, 41))
    ours, theirs = (trees.flatten(open_run(d).params) for d in (workdir, uninterrupted))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{seed} {name}")
    # A process that was killed before its first checkpoint left nothing that this run came from.
    sessions = json.loads((workdir / "receipt.json").read_text())["sessions"]
    assert len(sessions) in (2, 3)


def test_a_run_explains_itself(uninterrupted):
    receipt = json.loads((uninterrupted / "receipt.json").read_text())
    (session,) = receipt["sessions"]
    assert receipt["num_parameters"] == trees.num_elements(open_run(uninterrupted).params)
    assert session["packages"]["jax"] == jax.__version__ and session["mesh"]["data"] == 1
    assert any("size=100k,debug" in word for word in session["command"])
    assert receipt["data"]["train"]["documents"] > 0 and receipt["data"]["fingerprint"]
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(uninterrupted / "metrics.jsonl")
    assert rows[-1]["eval/validation/bits_per_byte"] < 8
    assert rows[0]["train/loss"] > rows[-2]["train/loss"]
    samples = read_rows(uninterrupted / "samples.jsonl")
    assert [row["step"] for row in samples] == [8, 16, 24, 32, 40]


def config_for(corpus, *overrides):
    words = (f"data.path={corpus}", "data.vocab_size=300", *OVERRIDES, *overrides)
    values, _ = load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)
    return run_config(values)


def train(config, workdir, cache_dir, devices=1):
    return fit(set_up(config, workdir, cache_dir, jax.devices()[:devices]))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, corpus, cache_dir):
    """Eight steps on one device, layers unrolled."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    config = config_for(corpus, "train.duration=8", "model.dropout=0.0")
    assert train(config, workdir, cache_dir) == FINISHED
    return workdir, config


def test_mesh_and_scan_are_free_to_change(short_run, corpus, cache_dir):
    workdir, config = short_run
    longer = dataclasses.replace(config.train, duration=10)
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2)
    model = dataclasses.replace(config.model, scan=True)
    there = workdir.with_name("elsewhere")
    here = workdir.with_name("here")
    for path in (there, here):
        subprocess.run(["cp", "-r", workdir, path], check=True)
    train(dataclasses.replace(config, train=longer), here, cache_dir)
    train(dataclasses.replace(config, train=longer, mesh=mesh, model=model), there, cache_dir, 8)
    ours, theirs = (
        [row["train/loss"] for row in read_rows(path / "metrics.jsonl") if "train/loss" in row]
        for path in (there, here)
    )
    assert len(ours) == 10
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)  # bf16 operands on this platform
    np.testing.assert_array_equal(ours[:8], theirs[:8])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.embed_dim=64", "model.embed_dim: 64 in the config, but the run in .* has 32"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate: 0.1 in the config"),
        ("seed=3", "seed: 3 in the config, but the run in .* has 0"),
        ("train.duration=2", "train.duration: 2 is 2 steps, but the run in .* has done 8"),
    ],
)
def test_a_changed_config_is_refused(short_run, corpus, cache_dir, override, told):
    workdir, _ = short_run
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    config = config_for(corpus, "train.duration=8", "model.dropout=0.0", override)
    with pytest.raises(ValueError, match=told):
        set_up(config, workdir, cache_dir, jax.devices()[:1])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))


def test_changed_data_are_refused(short_run, corpus, cache_dir, tmp_path):
    workdir, config = short_run
    subprocess.run(["cp", "-r", corpus, tmp_path / "corpus"], check=True)
    (tmp_path / "corpus" / "00.txt").write_text("something else. " * 50)
    data = dataclasses.replace(config.data, path=str(tmp_path / "corpus"))
    longer = dataclasses.replace(config.train, duration=10)
    with pytest.raises(ValueError, match="data: the train split has fingerprint"):
        set_up(dataclasses.replace(config, data=data, train=longer), workdir, cache_dir,
               jax.devices()[:1])  # fmt: skip


def test_a_run_belongs_to_one_process_at_a_time(corpus, cache_dir, tmp_path):
    config = config_for(corpus, "train.duration=2")
    first = set_up(config, tmp_path / "run", cache_dir, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"--workdir: .* is in use by another process"):
        set_up(config, tmp_path / "run", cache_dir, jax.devices()[:1])
    # What was not trained yet may be begun anew with another config.
    first.lock.close()
    first.checkpoints.close()
    again = set_up(config_for(corpus, "train.duration=2", "seed=5"), tmp_path / "run", cache_dir,
                   jax.devices()[:1])  # fmt: skip
    assert again.start == 0
    again.lock.close()
    again.checkpoints.close()


@pytest.mark.slow
def test_killed_at_thirty_moments(uninterrupted, tmp_path, corpus, cache_dir):
    """Kills at any time after the start, saves, evaluations and restarts included."""
    rng = np.random.default_rng(0)
    workdir, kills = tmp_path / "broken", 0
    while True:
        process = start(workdir, corpus, cache_dir)
        try:
            # Longer and longer, so that it comes to an end.
            output, _ = process.communicate(timeout=float(rng.uniform(2, 4 + kills)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            assert kills <= 30
            continue
        assert process.returncode == FINISHED, output
        break
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows, expected = (settled(read_rows(d / name)) for d in (workdir, uninterrupted))
        assert rows == expected, name
    assert kills


def test_one_flipped_bit_in_a_checkpoint_is_found(short_run, tmp_path):
    workdir, _ = short_run
    subprocess.run(["cp", "-r", workdir, tmp_path / "run"], check=True)
    folder = tmp_path / "run" / "checkpoints" / "8" / "params"
    data = max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint 8: params/.* is damaged"):
        open_run(tmp_path / "run", step=8)
    # The one before is whole.
    with pytest.warns(CheckpointWarning, match="checkpoint 8: params/.* step 7 is used instead"):
        assert open_run(tmp_path / "run").step == 7


def test_an_unknown_step_is_named(short_run):
    with pytest.raises(ValueError, match=r"step: 5 is not among the saved steps \[7, 8\]"):
        open_run(short_run[0], step=5)


def test_nothing_nonfinite_is_kept(corpus, cache_dir, tmp_path, monkeypatch):
    config = config_for(corpus, "train.checkpoint_every=2 steps", "train.duration=12")
    training = set_up(config, tmp_path / "run", cache_dir, jax.devices()[:1])
    whole = training.step

    def poisoned(state, batch, fixed):
        if int(state.step) == 6:
            batch = {**batch, "loss_mask": batch["loss_mask"] * np.nan}
        return whole(state, batch, fixed)

    training.step = poisoned
    with pytest.raises(NonFiniteError, match=r"step 7: .*rows of its batch: \[.*checkpoint is 6"):
        fit(training)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 7 and rows[-1]["train/loss"] == "nan"
    # The same command goes on from the last good step.
    assert train(config, tmp_path / "run", cache_dir) == FINISHED
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert all(isinstance(row["train/loss"], float) for row in rows if "train/loss" in row)


def test_rows_after_the_checkpoint_are_cut_off_and_a_torn_line_with_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    for step in range(5):
        log.write(step, {"x": float(step), "bad": float("inf")})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "x"')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    log = MetricsLog(path, 2)
    log.write(3, {"x": 9.0})
    log.close()
    assert [(row["step"], row["x"]) for row in read_rows(path)] == [(0, 0), (1, 1), (2, 2), (3, 9)]
    assert read_rows(path)[0]["bad"] == "inf"


def test_tensorboard_s_writer_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = (
        "import sys; from gpt_jax.runs.metrics import TensorBoard\n"
        "board = TensorBoard(sys.argv[1] + '/events', None)\n"
        "board.write(1, {'train/loss': 2.0}); board.close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment, check=True, cwd=tmp_path
    )
    assert list((tmp_path / "events").glob("events.out.*"))
