"""What a host of a launch does, with stubs for `train`; the files for GKE and SLURM."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launch_fixtures import Cloud, git

from gpt_jax.launch import commands, host, shipment, tpu
from gpt_jax.launch.job import Job, JobRun

# Does what the name of its run says; saves a step and prints its environment's TOKEN before.
_STUB = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(next(w for w in sys.argv if w.startswith("--workdir=")).partition("=")[2])
name, code = workdir.name, 0
(workdir / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
(workdir / "metrics.jsonl").write_text('{"step": 4, "train/loss": 2.5}\\n')
print(name, os.environ.get("TOKEN"), flush=True)
if name == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if name == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
if name.startswith("halt"):
    session = {"first_nonfinite": 3, "pid": os.getpid()}
    (workdir / "receipt.json").write_text(json.dumps({"sessions": [session]}))
    code = 1
sys.exit({"mistake": 2, "crash": 1, "saved": 75}.get(name.split("_")[0], code))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A host's folder; `python -m gpt_jax train` is the stub in it."""
    package = tmp_path / "stub" / "gpt_jax"
    package.mkdir(parents=True)
    # Behind the stub's __main__ lies the real package, for `start`.
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'gpt_jax')!r})\n")
    (package / "__main__.py").write_text(_STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "host"
    place.mkdir()
    return place


def write_job(folder: pathlib.Path, *names: str, sweep: str = "") -> None:
    places = {name: str(folder.parent / "runs" / name) for name in names}
    runs = tuple(JobRun(n, place, (f"--workdir={place}",)) for n, place in places.items())
    job = Job("an id", "a commit", sweep, str(folder.parent / "runs"), (), runs)
    (folder / "job.json").write_text(job.to_json())


@pytest.mark.parametrize(
    ("names", "sweep", "code", "halted"),
    [
        (["good"], "", 0, False),
        (["mistake"], "", 2, False),
        (["crash"], "", 1, False),
        (["saved"], "", 75, False),
        (["halt"], "", 1, True),
        (["good_1", "mistake", "good_2"], "s", 2, False),
        (["crash", "mistake", "good"], "s", 1, False),  # another start may help the first
        (["halt", "good"], "s", 0, False),  # diverged is done
        (["saved", "good"], "s", 75, False),
    ],
)
def test_a_job_ends_with_the_code_that_says_what_helps(folder, names, sweep, code, halted):
    write_job(folder, *names, sweep=sweep)
    assert host.run(folder) == (code, halted)
    assert json.loads((folder / "ended.json").read_text()) == {"code": code, "halted": halted}
    begun = {path.name for path in (folder.parent / "runs").iterdir()}
    assert begun == ({"saved"} if names[0] == "saved" else set(names))
    assert host.main(["run", str(folder)]) == (2 if halted else code)


def test_a_run_that_diverged_is_not_begun_again_by_a_sweep(folder, capfd):
    write_job(folder, "halt", "good", sweep="s")
    assert host.run(folder) == host.run(folder) == (0, False)
    printed = capfd.readouterr().out
    assert printed.count("halt None") == 1 and "halt: diverged before" in printed
    assert printed.count("good None") == 2  # which says itself that it is finished


def wait_for(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_is_started_once_told_of_and_stopped(folder, capsys):
    write_job(folder, "wait")
    token, log = 'can"ary', folder / "log"
    (folder / "env").write_text(json.dumps({"TOKEN": token}))
    assert host.status(folder, None)["state"] == "none"
    host.start(folder)
    wait_for(lambda: log.exists() and log.read_text() == f"wait {token}\n")
    with open(log, "a") as file:  # as text, quoted, and a line that is not whole yet
        file.write(json.dumps({"a": token}) + "\n" + token[:4])
    assert host.status(folder, 0)["log"] == 'wait ***\n{"a": "***"}\n'
    pid = json.loads((folder / "runner.json").read_text())["pid"]
    host.start(folder)
    assert json.loads((folder / "runner.json").read_text())["pid"] == pid
    host.main(["status", str(folder), "--log=5"])
    report = json.loads(capsys.readouterr().out.removeprefix(host.MARK))
    assert report == {
        "job": "an id", "state": "running", "code": None, "halted": False, "progress": 5,
        "row": {"run": "wait", "step": 4, "train/loss": 2.5}, 
        "log": '***\n{"a": "***"}\n', "offset": log.stat().st_size - 4,
    }  # fmt: skip
    words = b"\0".join(
        path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    )
    assert b'can"ary' not in words
    host.stop(folder)
    assert host.status(folder, report["offset"])["log"] == token[:4]  # nothing will follow
    assert host.status(folder, None)["state"] == "ended"
    assert host.status(folder, None)["code"] == 75  # it was left time to save
    host.stop(folder)  # nothing is left to stop


def test_a_job_whose_process_was_killed_has_failed(folder):
    write_job(folder, "wait")
    host.start(folder)
    wait_for(lambda: host.status(folder, 0)["log"])
    pid = json.loads((folder / "runner.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: host.status(folder, None)["state"] == "ended")
    assert host.status(folder, None)["code"] == 1
    os.killpg(pid, 0)  # the run itself is left, and would be in the way of another
    host.main(["restart", str(folder)])
    assert host.status(folder, None)["state"] == "running"
    wait_for(lambda: not is_alive(pid))
    host.stop(folder)


def is_alive(group: int) -> bool:
    """Whether a process of the group is left that is not about to be buried."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def test_a_run_that_does_not_save_in_time_is_killed(folder):
    write_job(folder, "deaf")
    host.start(folder)
    wait_for(lambda: host.status(folder, 0)["log"])
    pid = json.loads((folder / "runner.json").read_text())["pid"]
    host.stop(folder, seconds=0.3)
    assert not is_alive(pid) and host.status(folder, None)["state"] != "running"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return Cloud(tmp_path, monkeypatch)


def test_a_jobset_for_gke(cloud, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr(commands, "pack", shipment.pack)
    code, printed = cloud.up(
        "--target=gke", "--topology=v5e-16", "--slices=2", "--spot", "--secret=HF_TOKEN",
        "--workdir=gs://my-bucket/runs/a b", "--config.data.path=gs://texts/x",
    )  # fmt: skip
    assert code == 0, printed
    values = json.loads((cloud.records / "out" / "a.json").read_text())
    (slices,) = values["spec"]["replicatedJobs"]
    one = slices["template"]["spec"]
    assert (slices["replicas"], one["parallelism"], one["completions"]) == (2, 4, 4)
    pod = one["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    places = [volume["mountPath"] for volume in container["volumeMounts"]]
    assert places == ["/mnt/gs/my-bucket", "/mnt/gs/texts"]
    assert container["envFrom"] == [{"secretRef": {"name": "a"}}]
    # A mistake ends it all, what is left starts it again.
    assert one["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert values["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (archive,) = (cloud.records / "out").glob("*.tar.gz")
    script = container["command"][2]
    assert f"tar -xzf '/mnt/gs/my-bucket/runs/a b/launch/{archive.name}'" in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert f"gs://my-bucket/runs/a b/launch/{archive.name}" in printed
    assert "canary" not in printed + json.dumps(values) and '"$HF_TOKEN"' in printed
    assert not cloud.calls()


def test_a_script_for_slurm(cloud, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setattr(commands, "pack", shipment.pack)
    shared = tmp_path / "shared; x"
    words = ("--target=slurm", f"--workdir={shared}", "--secret=WANDB_API_KEY")
    code, printed = cloud.up(*words, "--nodes=2", "--gpus_per_node=4")
    assert code == 0, printed
    script = cloud.records / "out" / "a.sh"
    text = script.read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "canary" not in text + printed
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # The commands that are printed put the job where the script looks for it.
    for line in printed.splitlines()[1:3]:
        assert subprocess.run(["bash", "-c", line]).returncode == 0
    (place,) = (shared / "launch").iterdir()
    job = json.loads((place / "job.json").read_text())
    assert job["runs"][0]["workdir"] == str(shared)
    assert job["runs"][0]["arguments"][-1] == "--distributed=auto"
    assert git(place / "code", "rev-parse", "HEAD") == git(cloud.repository, "rev-parse", "HEAD")
    # With stubs for SLURM and the set-up it runs; what was interrupted is queued again.
    run = {"srun": "exit 75", "scontrol": f'echo "$@" > {tmp_path}/asked'}
    for name, does in run.items():
        path = cloud.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    setup = place / "code" / "gpt_jax" / "launch" / "host_setup.sh"
    setup.parent.mkdir(parents=True)
    setup.write_text("exit 0")
    environment = {**os.environ, "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    del environment["WANDB_API_KEY"]
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode and "WANDB_API_KEY: is not set" in done.stderr


@pytest.mark.parametrize("option", ["--workdir=runs/a", "--workdir=gs://my-bucket/a", "--nodes=0",
                                    "--config.data.path=gs://texts/x"])  # fmt: skip
def test_mistakes_with_slurm(cloud, option):
    words = [x for x in ("--workdir=/shared/a", "--nodes=1") if x[:6] != option[:6]]
    code, printed = cloud.up("--target=slurm", *words, option)
    assert code == 2 and printed.startswith("error: ")


def test_the_set_up_of_a_host(tmp_path):
    """Real bash, with stubs for what it installs; run again, it changes nothing."""
    setup = tmp_path / "gpt-jax" / "code" / "gpt_jax" / "launch" / "host_setup.sh"
    setup.parent.mkdir(parents=True)
    source = ROOT / "gpt_jax" / "launch" / "host_setup.sh"
    setup.write_text(source.read_text())
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("gcsfuse", "uv", "sudo", "mountpoint"):
        does = f'echo {name} "$@" >> {tmp_path}/said'
        if name == "sudo":
            does = '"$@"'
        if name == "mountpoint":
            does = f"grep -q {tmp_path}/mnt/my-bucket {tmp_path}/said"
        if name == "uv":
            does += f"; mkdir -p {tmp_path}/gpt-jax/venv"
        (binaries / name).write_text(f"#!/bin/sh\n{does}\n")
        (binaries / name).chmod(0o755)
    (tmp_path / "said").touch()
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    command = ["bash", str(setup), "tpu", str(tmp_path / "mnt"), "my-bucket"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    mount, venv, install = (tmp_path / "said").read_text().splitlines()
    assert mount.endswith(f"my-bucket {tmp_path}/mnt/my-bucket") and "--rename-dir-limit" in mount
    assert venv.startswith("uv venv") and install.endswith("/gpt-jax/code[tpu]")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="code is shipped from a repository")
def test_from_the_laptop_to_a_trained_run(cloud, tmp_path, monkeypatch, corpus):
    """A gcloud whose hosts are folders of this machine: the whole way, once preempted."""
    (cloud.folder / "bin" / "gcloud").write_text(
        (pathlib.Path(__file__).parent / "launch_local_gcloud.py")
        .read_text()
        .replace("#!/usr/bin/env python3", f"#!{sys.executable}")
    )
    home, buckets = tmp_path / "home", tmp_path / "buckets"
    for place in (home, buckets / "my-bucket"):
        place.mkdir(parents=True)
    for name, value in (("CLOUD", cloud.folder), ("HOST_HOME", home), ("BUCKETS", buckets)):
        monkeypatch.setenv(f"FAKE_{name}", str(value))
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    canary = "-".join(("canary", *"0123456789"))  # so that these lines do not hold it
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setattr(commands, "_PACKAGE", ROOT)
    monkeypatch.setattr(commands, "pack", shipment.pack)
    monkeypatch.setattr(commands, "MOUNTS", str(tmp_path / "mnt"))
    monkeypatch.setattr(tpu, "_wait", time.sleep)
    code, printed = cloud.up(
        f"--config={ROOT}/configs/gpt.py:size=100k,debug", "--topology=v5e-4", "--spot",
        "--allow_dirty", "--secret=HF_TOKEN", f"--config.data.path={corpus}", "--poll=0.5",
        "--config.train.checkpoint_every=5 steps", "--config.train.duration=40 steps",
        "--price=1.2",
    )  # fmt: skip
    assert code == 0, printed
    run = buckets / "my-bucket" / "runs" / "a"
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["sessions"][0]["git_commit"] == git(ROOT, "rev-parse", "HEAD").strip()
    assert len(receipt["sessions"]) == 2 and receipt["sessions"][1]["start_step"] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40
    known = cloud.record()
    assert known["preemptions"] == 1 and known["row"]["step"] == 40
    assert not home.exists()  # deleted
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size < 1e6]
    assert len(files) > 20
    assert not [path for path in files if canary.encode() in path.read_bytes()]
