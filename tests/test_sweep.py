"""Sweeps: what a config's generators stand for, and the runner that starts what is missing."""

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from sweep_fixtures import stub_command, write_config

from gpt_jax.cli.main import main
from gpt_jax.launch import standing, warm
from gpt_jax.launch.local import _shares, run_sweep
from gpt_jax.launch.sweeps import plan_sweep, short
from gpt_jax.runs.ledger import read_ledger
from gpt_jax.scaling import counts, grids


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, cache_dir):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("GPT_JAX_CACHE", str(cache_dir))


def test_grids_combine():
    widths, seeds = grids.values("model.embed_dim", [32, 64]), grids.values("seed", [0, 1])
    assert grids.product(widths, seeds) == [
        {"model.embed_dim": 32, "seed": 0}, {"model.embed_dim": 32, "seed": 1},
        {"model.embed_dim": 64, "seed": 0}, {"model.embed_dim": 64, "seed": 1},
    ]  # fmt: skip
    assert grids.zipped(widths, seeds) == [
        {"model.embed_dim": 32, "seed": 0}, {"model.embed_dim": 64, "seed": 1},
    ]  # fmt: skip
    assert grids.chain(widths, ({"seed": s} for s in (2, 3))) == [*widths, {"seed": 2}, {"seed": 3}]
    assert grids.product() == [{}]
    for combine in (grids.product, grids.zipped):
        with pytest.raises(ValueError, match=r"^seed: given by two grids"):
            combine(seeds, grids.values("seed", [5, 6]))
    with pytest.raises(ValueError, match=r"^zipped: grids of 2 and 1 runs"):
        grids.zipped(seeds, widths[:1])


def plan(folder, runs, corpus="", changes=(), argument=""):
    """The planned runs of a sweep that yields `runs`."""
    sweep = f"\ndef sweep_x():\n    return {runs!r}\n"
    return plan_sweep(write_config(folder, corpus, sweep) + argument, "x", folder / "s", changes)


def test_a_planned_run_is_what_the_config_says(tmp_path):
    first, second = plan(tmp_path, [
        {"model.embed_dim": 64, "train.duration": "300 steps", "group": "wide"},
        {"seed": 3, "name": "mine", "train.sample_prompts": ["a", ""]},
    ], changes=["optimizer.learning_rate=0.5", "seed=1"])  # fmt: skip
    model = first.config.model
    assert (model.embed_dim, first.config.train.duration, first.steps) == (64, "300 steps", 300)
    assert first.num_params == counts.num_parameters(model)
    assert first.num_params_non_embedding == first.num_params - 512 * 64
    assert first.num_tokens == 300 * 8 * 32
    assert first.flops == counts.flops_per_token(model, 32) * first.num_tokens
    assert (first.group, first.overrides["train.duration"]) == ("wide", "300 steps")
    # What the command line says is for every run, and wins.
    assert first.config.optimizer.learning_rate == 0.5
    assert (second.name, second.config.seed, second.workdir) == ("mine", 1, tmp_path / "s" / "mine")
    assert second.config.train.sample_prompts == ("a", "")
    assert second.arguments[-1] == "--config.seed=1"


def test_names_carry_compute_size_data_and_seed(tmp_path):
    names = [run.name for run in plan(tmp_path, [
        {"train.duration": "300 steps"},
        {"train.duration": "2 epochs", "seed": 4},
        {"train.duration": "2 epochs", "data.train_tokens": 3200},
        {"optimizer.learning_rate": 0.003, "train.sample_prompts": ("a b", "c")},
        {"optimizer.b1": 0.5, "init.word_vectors": "some/where.txt"},
    ])]  # fmt: skip
    assert names == [
        "c2e10-n41.2k-d76.8k-s0",
        "n41.2k-d2epochs-s4",  # known when the data are read
        "c1.7e9-n41.2k-d6.4k-s0-train_tokens=3200",
        "c1.3e9-n41.2k-d5.12k-s0-learning_rate=0.003-sample_prompts=a_b+c",
        "c1.3e9-n41.2k-d5.12k-s0-b1=0.5-word_vectors=where.txt",
    ]
    assert [short(x) for x in (999, 999.9, 48_000, 3.2e6, 1.284e9, 2e12)] == [
        "999", "1k", "48k", "3.2m", "1.28b", "2t",
    ]  # fmt: skip


def test_one_name_is_one_config(tmp_path):
    same = [{"seed": 1}, {"seed": 1, "group": "again"}, {"seed": 2}]
    assert [run.config.seed for run in plan(tmp_path, same)] == [1, 2]
    wrong = [{"name": "a", "seed": 1}, {"name": "a", "seed": 2}]
    with pytest.raises(ValueError, match=r"^name: 'a' is the name of two runs .*1.* and .*2"):
        plan(tmp_path, wrong)


def test_a_run_can_begin_from_another(tmp_path):
    base = {"name": "base", "model.embed_dim": 64}
    tuned = {"name": "tuned", "init.source": "{sweep}/base", "model.dropout": 0.5}
    last = {"name": "last", "init.source": "{sweep}/tuned"}
    runs = plan(tmp_path, [last, tuned, base])
    assert [(run.name, run.needs) for run in runs] == [
        ("last", ("tuned",)), ("tuned", ("base",)), ("base", ()),
    ]  # fmt: skip
    assert runs[1].config.model.embed_dim == 32  # the config says it
    assert runs[1].config.init.source == str(tmp_path / "s" / "base")
    assert runs[0].overrides["init.source"] == "{sweep}/tuned"
    for wrong in ([last, base], [{"name": "a", "init.source": "{sweep}/a"}]):
        with pytest.raises(ValueError, match=r"^init.source: '\{sweep\}/\w+' is no other run"):
            plan(tmp_path, wrong)


def test_a_model_is_inherited_from_a_run_that_is_not_there_yet(tmp_path):
    sweep = """
def get_config(argument=None):
    config = gpt("size=100k,debug")
    config.model = {}
    config.data = {"seq_len": 32}
    config.init = {"source": "", "step": -1}
    return config

def sweep_x():
    yield {"name": "tuned", "init.source": "{sweep}/base"}
    model = {"model.num_layers": 3, "model.embed_dim": 48, "model.num_heads": 3}
    model |= {"model.vocab_size": 257, "model.seq_len": 32}
    yield {"name": "base", "data.tokenizer": "bytes", **model}
"""
    tuned, base = plan_sweep(write_config(tmp_path, "", sweep), "x", tmp_path / "s")
    assert tuned.config.model == base.config.model and base.config.model.num_layers == 3
    assert tuned.config.data.tokenizer == str(tmp_path / "s" / "base" / "tokenizer.json")


@pytest.mark.parametrize(("run", "message"), [
    ({"model.num_head": 3}, r"^model.num_head: no such key; the nearest is model.num_heads"),
    ({"seed": "one"}, r"^seed: 'one' is not of type int"),
    ({"data.name": 3}, r"^data.name: 3 is not of type str"),
    ({"model.num_heads": 3}, r"^model.num_heads: 3 is not a divisor of embed_dim 32"),
    ({"name": "a/b"}, r"^name: 'a/b' cannot name a folder"),
    ({"name": ".."}, r"^name: '..' cannot name a folder"),
    ({"name": 3}, r"^name: 3 is not a text"),
])  # fmt: skip
def test_a_mistake_names_the_field_and_the_run(tmp_path, run, message):
    with pytest.raises(ValueError, match=message + r".*\(run 2 of the sweep 'x'\)$"):
        plan(tmp_path, [{"seed": 5}, run])


def test_a_sweep_that_is_none(tmp_path):
    spec = write_config(tmp_path, "", "\ndef sweep_empty(): return []\ndef sweep_odd(): return [3]")
    for name, message in {
        "other": r"^--sweep: 'other' is not one of seeds, empty, odd in ",
        "empty": r"^--sweep: 'empty' has no run",
        "odd": r"^--sweep: run 1 of 'odd' is 3, not a dict",
    }.items():
        with pytest.raises(ValueError, match=message):
            plan_sweep(spec, name, tmp_path)


def go(folder, runs, **options):
    """Runs a sweep with the stub: the exit code, what it said, and in which order it ran."""
    said = []
    options = {"command": stub_command, "say": said.append, **options}
    (folder / "s").mkdir(exist_ok=True)
    (folder / "s" / "order.txt").write_text("")
    code = run_sweep(runs, folder / "s", **options)
    order = [line.split()[0] for line in (folder / "s" / "order.txt").read_text().splitlines()]
    return code, "\n".join(said), order


def named(*names):
    return [{"name": name, "seed": i} for i, name in enumerate(names)]


def test_what_is_done_is_skipped(tmp_path):
    runs = plan(tmp_path, named("a", "b", "c"))
    copy = tmp_path / "copy" / "ledger.jsonl"
    assert go(tmp_path, runs[:2], ledger=copy)[::2] == (0, ["a", "b"])
    rows = read_ledger(copy)
    assert [(row["name"], row["status"], row["overrides"]["seed"]) for row in rows] == [
        ("a", "finished", 0), ("b", "finished", 1),
    ]  # fmt: skip
    code, said, order = go(tmp_path, runs, ledger=copy)
    assert (code, order) == (0, ["c"]) and "2 of 3 runs are done" in said
    assert [row["name"] for row in read_ledger(copy)] == ["a", "b", "c"]
    assert copy.read_bytes() == (tmp_path / "s" / "ledger.jsonl").read_bytes()
    # Another sweep of the folder keeps the rows of runs that lie there.
    assert go(tmp_path, runs[:1])[2] == []
    assert len(read_ledger(tmp_path / "s" / "ledger.jsonl")) == 3
    # A longer run than the one that is finished goes on; another run in its place is refused.
    assert go(tmp_path, plan(tmp_path, [{"name": "a", "train.duration": 30}]))[2] == ["a"]
    with pytest.raises(ValueError, match=r"^seed: 7 in the config, but the run in .* has 1"):
        go(tmp_path, plan(tmp_path, [{"name": "b", "seed": 7}]))


def test_a_run_that_fails_stops_only_those_that_need_it(tmp_path):
    later = {"name": "later", "init.source": "{sweep}/bad"}
    runs = plan(tmp_path, [*named("bad", "killed", "wild", "good"), later])
    code, said, order = go(tmp_path, runs)
    assert (code, order) == (1, ["bad", "killed", "wild", "good"])
    assert "bad: FAILED (exit code 2): error: what is wrong; log: " in said
    assert "killed: FAILED (SIGKILL)" in said
    assert "later: not run, as it needs bad" in said
    assert said.endswith("3 of 5 runs failed: bad, killed, later")
    status = {row["name"]: row["status"] for row in read_ledger(tmp_path / "s" / "ledger.jsonl")}
    assert status == {"wild": "diverged", "good": "finished"}
    shown = "\n".join(standing.status(runs, tmp_path / "s", 1))
    assert shown.startswith("5 runs: 1 finished, 0 running, 3 failed, 1 diverged")
    assert "failed    bad: error: what is wrong" in shown
    # What failed is tried again; what diverged would diverge again.
    code, said, order = go(tmp_path, runs)
    assert (code, order) == (1, ["bad", "killed"]) and "wild: diverged before" in said
    assert go(tmp_path, runs[2:4])[::2] == (0, [])


def test_runs_wait_for_those_that_they_begin_from(tmp_path):
    tuned = {"name": "tuned", "init.source": "{sweep}/base"}
    runs = plan(tmp_path, [tuned, {"name": "base"}])
    assert go(tmp_path, runs, processes=2)[::2] == (0, ["base", "tuned"])
    # The run of another sweep in the same folder will do.
    assert go(tmp_path, plan(tmp_path, [{**tuned, "name": "other"}]))[::2] == (0, ["other"])


def test_a_signal_is_passed_on_and_the_same_command_continues(tmp_path):
    runs = plan(tmp_path, named("slow-stops", "after"))
    code, said, order = go(tmp_path, runs)
    assert (code, order) == (75, ["slow-stops"])
    assert "SIGTERM: waiting for 1 runs to save" in said
    assert "slow-stops: interrupted: SIGTERM: saved step 1" in said
    assert said.endswith("interrupted, 2 runs are left; the same command continues")
    (row,) = read_ledger(tmp_path / "s" / "ledger.jsonl")
    assert (row["status"], row["num_tokens"]) == ("unfinished", 256)
    code, said, order = go(tmp_path, runs)
    assert (code, order) == (0, ["slow-stops", "after"])


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_sweep_that_is_killed_leaves_no_run_behind(tmp_path):
    write_config(tmp_path, "", "\ndef sweep_x(): return [{'name': 'slow'}]\n")
    code = (
        "import pathlib, sys; sys.path.insert(0, 'tests')\n"
        "from sweep_fixtures import stub_command\n"
        "from gpt_jax.launch.local import run_sweep\n"
        "from gpt_jax.launch.sweeps import plan_sweep\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "runs = plan_sweep(str(folder / 'sweeps.py'), 'x', folder / 's')\n"
        "run_sweep(runs, folder / 's', command=stub_command)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    wait_for((tmp_path / "s" / "slow" / "ready").exists)
    runs = plan_sweep(str(tmp_path / "sweeps.py"), "x", tmp_path / "s")
    assert "1 running" in standing.status(runs, tmp_path / "s", 1)[0]
    with pytest.raises(ValueError, match=r"^--workdir: .* is in use by another sweep"):
        go(tmp_path, runs)
    sweep.kill()
    sweep.wait()
    wait_for((tmp_path / "s" / "slow" / "checkpoints").exists)  # the run saved and ended
    assert go(tmp_path, runs)[::2] == (0, ["slow"])


def test_a_run_that_a_process_is_at_is_waited_for(tmp_path):
    runs = plan(tmp_path, named("a", "b"))
    (tmp_path / "s" / "a").mkdir(parents=True)
    with open(tmp_path / "s" / "a" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        code, said, order = go(tmp_path, runs)
    assert (code, order) == (0, ["b", "a"]) and "a: waits, another process is at it" in said


def test_processes_share_the_cores(tmp_path, monkeypatch):
    assert _shares(1) == [None]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 4, 5, 7})
    assert _shares(2) == [{1, 2}, {4, 5, 7}]
    assert _shares(7) == [{1}, {1}, {2}, {4}, {4}, {5}, {7}]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^--processes: 0 is not at least 1"):
        run_sweep([], tmp_path, processes=0)


def test_the_time_of_the_rest_is_told_by_what_is_finished(tmp_path):
    runs = plan(tmp_path, [{"name": "a"}, {"name": "b", "train.duration": "40 steps"}])
    assert go(tmp_path, runs[:1])[0] == 0
    row = standing.row_of(runs[0])
    # 20 steps of 256 tokens at 100 a second; 9 seconds on the clock of the rows are less.
    (rate,) = standing.rates([row], tmp_path / "s")
    assert rate.flops_per_sec == 10.0 * 100 and rate.overhead == 0
    flops = runs[1].flops
    assert standing.estimate(runs[1], None, [rate]) == pytest.approx(flops / 1000.0)
    half = {"num_tokens": 20 * 256}
    assert standing.estimate(runs[1], half, [rate]) == pytest.approx(flops / 2000.0)
    lines = standing.table(runs, tmp_path / "s", processes=1)
    assert lines[1].split()[-1] == "finished" and lines[2].endswith("to run")
    assert lines[2].split()[:2] == ["b", f"{runs[1].num_params:,}"]
    assert "2 runs: 1 finished, 0 running, 0 failed, 1 to run" in lines[3]


def command(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        main(["sweep", *argv])
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def test_a_sweep_of_two_runs(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the runs' processes
    spec = write_config(tmp_path, corpus) + ":short"
    workdir = tmp_path / "s"
    argv = [f"--config={spec}", "--sweep=seeds", f"--workdir={workdir}", "--config.train.keep=1"]
    code, out, _ = command(capsys, *argv, "--dry_run")
    assert code == 0 and not workdir.exists()
    assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["run", "run"]
    code, out, _ = command(capsys, *argv, f"--ledger={tmp_path / 'l.jsonl'}")
    assert code == 0, out
    rows = read_ledger(tmp_path / "l.jsonl")
    runs = plan_sweep(spec, "seeds", workdir, ["train.keep=1"])
    for run, row in zip(runs, rows, strict=True):
        assert json.loads((run.workdir / "config.json").read_text()) == json.loads(
            json.dumps(run.config.to_dict())
        )
        assert (row["name"], row["status"], row["group"]) == (run.name, "finished", "noise")
        for name in ("num_params", "num_params_non_embedding", "num_tokens", "flops"):
            assert row[name] == getattr(run, name), name
        assert 0 < row["loss"] < 7 and len(row["curve"]) == 4 and row["seconds"] > 0
    assert rows[0]["loss"] != rows[1]["loss"]
    before = (tmp_path / "l.jsonl").read_bytes()
    code, out, _ = command(capsys, *argv, f"--ledger={tmp_path / 'l.jsonl'}")
    assert code == 0 and "begins" not in out and (tmp_path / "l.jsonl").read_bytes() == before
    assert "2 runs: 2 finished" in command(capsys, *argv, "--status")[1]
    code, _, err = command(capsys, *argv, "--config.modle.num_heads=3")
    assert code == 2 and err.startswith("error: modle.num_heads: no such key")


VOLATILE = ("seconds", "tokens_per_sec", "git_commit")  # a commit may be made while this runs


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_with_the_same_ledger(tmp_path, corpus):
    sweep = """
def sweep_x():
    yield from grids.values("seed", [0, 1])
    yield {"name": "wide", "model.embed_dim": 64}
    yield {"name": "tuned", "init.source": "{sweep}/wide", "optimizer.learning_rate": 1e-4,
           "model.embed_dim": 64}
    yield {"name": "wild", "optimizer.learning_rate": 1e30, "train.log_every": 1}
"""
    # Where a run begins from is part of its config: the folder has one name in both.
    spec, folder = write_config(tmp_path, corpus, sweep), tmp_path / "sweep"
    argv = [sys.executable, "-m", "gpt_jax", "sweep", f"--config={spec}", "--sweep=x"]
    argv += [f"--workdir={folder}", "--processes=2", "--config.train.duration=400 steps"]
    ledgers, chance, whole = [], random.Random(), 0.0
    for name, kills in (("alone", 0), ("killed", 3)):
        for _ in range(kills):
            process = subprocess.Popen(argv, cwd=ROOT)
            delay = chance.uniform(0.05, 0.25) * whole
            print(f"killed after {delay:.1f} of {whole:.1f} s", flush=True)
            time.sleep(delay)
            process.kill()
            process.wait()
        begun = time.monotonic()
        assert subprocess.run(argv, cwd=ROOT).returncode == 0
        whole = time.monotonic() - begun
        rows = read_ledger(folder / "ledger.jsonl")
        ledgers.append([{k: v for k, v in row.items() if k not in VOLATILE} for row in rows])
        folder.rename(tmp_path / name)
    assert [row["status"] for row in ledgers[0]] == [*["finished"] * 4, "diverged"]
    assert ledgers[0] == ledgers[1]


def test_a_process_that_begins_warm_is_as_one_of_its_own(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['SAID'], sorted(os.sched_getaffinity(0)))\n"
        "print('jax' in sys.modules, os.getsid(0) == os.getpid(), file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    monkeypatch.chdir(tmp_path)
    core = min(os.sched_getaffinity(0))
    for said in ("one", "two"):  # what is said after the first has begun counts too
        monkeypatch.setenv("SAID", said)
        process = warm.start([str(script), "a", "b c"], log=tmp_path / "log", cores={core})
        process.join()
        assert process.exitcode == 7
        told = f"['a', 'b c'] {tmp_path} {said} [{core}]\n"
        assert told in (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("True True") == 2
    process = warm.start(["-m", "gpt_jax", "none"], log=tmp_path / "log")
    process.join()
    assert process.exitcode == 2 and "invalid choice: 'none'" in (tmp_path / "log").read_text()
