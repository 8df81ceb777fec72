"""`gpt-jax launch` against a gcloud that answers from a script: the real code, no cloud."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import tarfile
import types

import pytest
from launch_fixtures import Cloud, commit, git

from gpt_jax.launch import commands, gcloud, record, shipment, tpu
from gpt_jax.launch.gcloud import remote
from gpt_jax.launch.target import Target, mounted

CANARY = "hf_canary'\"$(rm)\n0123456789"
RUNNING = {"state": "running", "code": None}
CRASHED = {"state": "ended", "code": 1}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return Cloud(tmp_path, monkeypatch)


@pytest.fixture
def packed(cloud, monkeypatch):
    """The same, and the code is really packed."""
    monkeypatch.setattr(commands, "pack", shipment.pack)
    return cloud


def test_a_job_is_shipped_run_followed_and_all_is_given_back(cloud):
    row = {"run": "a", "step": 7, "train/loss": 2.5}
    cloud.script(status=[{**RUNNING, "log": "step 1\n", "offset": 7, "progress": 5}, {"row": row}])
    code, printed = cloud.up("--price=2")
    assert code == 0, printed
    assert cloud.verbs() == [
        "describe", "create", "describe", "scp", "prepare", "start", "describe", "status",
        "describe", "status", "status_of_all", "delete",
    ]  # fmt: skip
    assert "step 1\n" in printed and (cloud.records / "a.log").read_text() == "step 1\n"
    known = cloud.record()
    assert (known["code_of_end"], known["state"], known["starts"]) == (0, "deleted", 1)
    assert known["row"] == row and len(known["active"]) == 1
    assert known["code"] == git(cloud.repository, "rev-parse", "HEAD")[:12]
    second = [call["words"][-1] for call in cloud.calls() if call["verb"] == "status"][1]
    assert second.endswith("status .. --log=7")  # what was seen is not sent again


def test_what_is_asked_for(cloud):
    assert cloud.up("--spot", "--slices=3", "--max_wait=1.5")[0] == 0
    create = next(call["words"] for call in cloud.calls() if call["verb"] == "create")
    assert create == [
        "compute", "tpus", "queued-resources", "create", "a", "--zone=us-west4-a",
        "--project=my-project", "--quiet", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-count=3", "--node-prefix=a", "--spot",
        "--valid-until-duration=5400s",
    ]  # fmt: skip
    cloud.up("--reserved", "--topology=v4-8", "--zone=us-central2-b")
    create = [call["words"] for call in cloud.calls() if call["verb"] == "create"][1]
    assert {"--reserved", "--node-id=a", "--accelerator-type=v4-8"} < set(create)


@pytest.mark.parametrize(
    ("topology", "hosts", "kind"),
    [("v5e-4", 1, "v5litepod-4"), ("v5e-8", 1, "v5litepod-8"), ("v6e-16", 4, "v6e-16"),
     ("v4-8", 1, "v4-8"), ("v5p-16", 2, "v5p-16")],
)  # fmt: skip
def test_slices_have_hosts(topology, hosts, kind):
    target = Target("a", "my-project", "us-west4-a", topology)
    assert (target.num_hosts, target.accelerator_type) == (hosts, kind)


def job_of(archive: pathlib.Path) -> dict:
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile("job.json"))


def test_several_hosts_are_one_program_and_one_host_is_none(cloud):
    for topology, together in (("v5e-16", True), ("v5e-8", False)):
        cloud.up(f"--topology={topology}")
        words = job_of(cloud.folder / "archive")["runs"][0]["arguments"]
        assert ("--distributed=auto" in words) == together


def test_a_sweep_is_a_list_of_runs_and_buckets_are_paths(cloud):
    code, printed = cloud.up("--sweep=seeds", "--config.data.path=gs://texts/wiki")
    assert code == 0, printed
    job = job_of(cloud.folder / "archive")
    assert [run["name"] for run in job["runs"]] == ["a", "b"]
    assert job["buckets"] == ["my-bucket", "texts"]
    words = job["runs"][1]["arguments"]
    assert "--config.init.source=/mnt/gs/my-bucket/runs/a/a" in words
    assert "--config.data.path=/mnt/gs/texts/wiki" in words
    assert words[:2] == ["--config=config.py", "--workdir=/mnt/gs/my-bucket/runs/a/b"]


def test_no_secret_leaves_by_any_way_but_stdin(packed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    quoted = json.dumps(CANARY)[1:-1]
    packed.script(describe_slice=[2], status=[RUNNING, None])
    code, printed = packed.up("--secret=HF_TOKEN", "--slices=2")
    assert code == 0, printed
    sent = [call for call in packed.calls() if call["verb"] == "env"]
    assert [call["words"][5:7] for call in sent] == [
        [f"--worker={worker}", f"--node={node}"] for node in (0, 1) for worker in (0, 1)
    ]
    assert all(json.loads(call["stdin"]) == {"HF_TOKEN": CANARY} for call in sent)
    assert all(call["words"][-1] == "--command=umask 077 && cat > gpt-jax/a/env" for call in sent)
    others = [call for call in packed.calls() if call["verb"] != "env"]
    seen = [printed, json.dumps([call["words"] for call in packed.calls()])]
    seen += [call["stdin"] for call in others]
    seen += [path.read_text() for path in packed.records.rglob("*") if path.is_file()]
    with tarfile.open(packed.folder / "archive") as tar:
        for member in tar:
            if member.isfile():
                seen.append(tar.extractfile(member).read().decode(errors="replace"))
    assert len(seen) > 20
    for form in (CANARY, quoted, "0123456789"):
        assert not [text for text in seen if form in text]


def test_secrets_are_named_not_given(cloud, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    code, printed = cloud.up("--secret=hf_canary=x")
    assert code == 2 and "hf_canary" not in printed
    assert cloud.up("--secret=NOT_SET_ANYWHERE")[0] == 2
    code, printed = cloud.up("--secret=HF_TOKEN", "--config.data.path=/x/hf_canary")
    assert code == 2 and "value of HF_TOKEN is in the config" in printed
    (cloud.repository / "notes").write_text("hf_canary")
    code, printed = cloud.up("--secret=HF_TOKEN", "--allow_dirty")
    assert code == 2 and "value of HF_TOKEN is in the uncommitted" in printed
    assert not cloud.calls()


def test_what_is_taken_away_is_asked_for_again(cloud):
    cloud.script(
        describe=["ACTIVE", "ACTIVE", "SUSPENDING", "WAITING_FOR_RESOURCES", "ACTIVE"],
        status=[{**RUNNING, "log": "one\n", "offset": 4, "progress": 3}, None],
    )
    code, printed = cloud.up("--spot")
    assert code == 0, printed
    verbs = cloud.verbs()
    assert verbs.count("create") == verbs.count("scp") == verbs.count("start") == 2
    assert verbs.index("delete") < len(verbs) - 1 and verbs[-1] == "delete"
    known = cloud.record()
    assert (known["preemptions"], known["starts"], len(known["active"])) == (1, 2, 2)
    last = [call["words"][-1] for call in cloud.calls() if call["verb"] == "status"][-1]
    assert last.endswith("--log=0")  # the log of another machine


def test_what_is_taken_away_for_ever_ends(cloud, monkeypatch):
    monkeypatch.setattr(tpu, "_MOST_TAKEN", 3)
    cloud.script(describe=["ACTIVE", "SUSPENDED"] * 9, status=[RUNNING])
    code, printed = cloud.up("--spot")
    assert code == 1 and "taken away 3 times before anything was saved" in printed
    assert cloud.verbs().count("create") == 3 and cloud.verbs()[-1] == "delete"


def test_a_queue_is_waited_in_at_no_cost(cloud, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tpu, "time", types.SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(tpu, "_wait", lambda seconds: clock.__setitem__(0, clock[0] + 3600))
    cloud.script(describe=["CREATING", *["WAITING_FOR_RESOURCES"] * 4, "PROVISIONING", "ACTIVE"],
                 status=[RUNNING, RUNNING, None])  # fmt: skip
    code, printed = cloud.up("--price=2")
    assert code == 0 and printed.count("WAITING_FOR_RESOURCES") == 1
    assert [call["verb"] for call in cloud.calls()].count("describe") == 11
    # Of eight hours six in the queue.
    assert cloud.record()["active"] == [[6 * 3600, 8 * 3600]]
    assert "32.00 chip-hours: 64.00 at 2 each" in printed


def test_a_request_that_fails_in_the_queue_is_deleted(cloud):
    message = "Insufficient capacity"
    failed = {"state": {"state": "FAILED", "failedData": {"error": {"message": message}}}}
    cloud.script(describe=["WAITING_FOR_RESOURCES", failed])
    code, printed = cloud.up()
    assert code == 1 and message in printed
    assert cloud.verbs()[-1] == "delete" and "scp" not in cloud.verbs()


def test_an_exceeded_quota_is_told(cloud):
    error = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 0 in region x."
    cloud.script(create=[{"err": error}])
    code, printed = cloud.up()
    assert code == 1 and error in printed
    assert cloud.verbs() == ["describe", "create", "delete"]
    assert cloud.record()["state"] == "deleted"


@pytest.mark.parametrize(
    ("step", "keep"),
    [*((x, False) for x in ("scp", "prepare", "describe_slice", "env", "start")), ("start", True)],
)
def test_slices_that_cannot_be_set_up_are_given_back(cloud, monkeypatch, step, keep):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    cloud.script(**{step: [{"err": "no space left on device"}]})
    code, printed = cloud.up("--secret=HF_TOKEN", *(["--keep"] if keep else []))
    assert code == 1 and "no space left on device" in printed
    assert ("delete" in cloud.verbs()) != keep
    assert (cloud.folder / "there").exists() == keep
    assert [call["verb"] for call in cloud.calls()].count(step) == (6 if step == "scp" else 1)


def test_a_deletion_that_fails_is_tried_again_and_told(cloud):
    cloud.script(delete=[{"err": "INTERNAL"}, None])
    assert cloud.up()[0] == 0 and not (cloud.folder / "there").exists()
    cloud.script(delete=[{"err": "INTERNAL"}])
    _, printed = cloud.up()
    assert "NOT deleted" in printed and cloud.record()["state"] == "NOT deleted"


def test_a_crash_is_started_again_a_crash_loop_is_not(cloud):
    on = [{**CRASHED, "progress": n} for n in (3, 3, 6, 6, 6)]
    cloud.script(status=on, status_of_all=[CRASHED])
    code, printed = cloud.up()
    assert code == 1 and "crash loop: 3 starts" in printed
    # Twice at 3, then it came to 6: counted from there.
    assert cloud.verbs().count("restart") == 4 and cloud.verbs()[-1] == "delete"


@pytest.mark.parametrize(
    ("report", "code", "words"),
    [({"code": 2}, 2, "refuses its config"), ({"code": 1, "halted": True}, 1, "halted")],
)
def test_what_would_only_be_repeated_is_not_started_again(cloud, report, code, words):
    cloud.script(status=[report], status_of_all=[report])
    found, printed = cloud.up()
    assert found == code and words in printed
    assert "restart" not in cloud.verbs() and cloud.verbs()[-1] == "delete"


def test_an_interrupted_run_is_started_again_unless_its_machine_goes(cloud):
    saved = {"code": 75}
    cloud.script(status=[*[saved] * 5, None], status_of_all=[*[saved] * 5, None])
    assert cloud.up()[0] == 0 and cloud.verbs().count("restart") == 1
    # However often: each time it is waited for anew.
    cloud.script(describe=[*(["ACTIVE"] * 3 + ["SUSPENDED"]) * 3, "ACTIVE"],
                 status=[*[saved] * 6, None], status_of_all=[*[saved] * 6, None])  # fmt: skip
    calls = len(cloud.calls())
    assert cloud.up("--spot")[0] == 0
    later = [call["verb"] for call in cloud.calls()[calls:]]
    assert "restart" not in later and later.count("create") == 4


@pytest.mark.parametrize(("ended", "code"), [({}, 0), (CRASHED, 1)])
def test_a_host_that_is_dead_at_the_end_is_not_waited_for_for_ever(cloud, monkeypatch, ended, code):
    monkeypatch.setattr(tpu, "_MOST_WAITED", 3)
    cloud.script(status=[ended], status_of_all=[{"err": "ssh: connect to host: timed out"}])
    assert cloud.up()[0] == code and cloud.verbs()[-1] == "delete"
    number = [call["verb"] for call in cloud.calls()].count("status_of_all")
    assert number == (4 if code == 0 else 12)  # of a crash three starts


def test_hosts_that_do_not_answer_are_asked_again_then_given_up(cloud, monkeypatch):
    lost = {"err": "ssh: connect to host: Connection timed out"}
    cloud.script(status=[lost, lost, None])
    assert cloud.up()[0] == 0 and cloud.verbs().count("create") == 1
    monkeypatch.setattr(tpu, "_MOST_SILENT", 3)
    cloud.script(status=[lost, lost, lost, None])
    assert cloud.up()[0] == 0 and cloud.record()["preemptions"] == 1


def test_a_network_that_is_away_ends_nothing(cloud, monkeypatch):
    away = {"err": "Could not resolve host"}
    cloud.script(describe=["ACTIVE", "ACTIVE", away, away, "ACTIVE"], status=[RUNNING, None])
    code, printed = cloud.up()
    assert code == 0 and printed.count("Could not resolve host") == 1
    monkeypatch.setattr(tpu, "_MOST_TRIES", 3)
    cloud.script(describe=["ACTIVE", "ACTIVE", away], status=[RUNNING])
    calls = len(cloud.calls())
    code, printed = cloud.up()
    assert code == 1 and "goes on, and costs" in printed
    assert "delete" not in [call["verb"] for call in cloud.calls()[calls:]]


def test_a_deletion_that_is_broken_off_is_told(cloud, monkeypatch):
    def interrupted(queue):
        raise KeyboardInterrupt

    monkeypatch.setattr(gcloud.Queue, "deleted", interrupted)
    code, printed = cloud.up()
    assert code == 0 and "NOT deleted, it may go on to cost" in printed


def interrupt(monkeypatch, at: int):
    """Ctrl-C in the at-th wait."""
    waits = iter(range(1, 1000))

    def sleep(seconds):
        if next(waits) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(tpu, "_wait", sleep)


def test_ctrl_c_leaves_a_job_that_the_same_command_follows(cloud, monkeypatch):
    cloud.script(status=[{**RUNNING, "log": "one\n", "offset": 4}])
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        code, printed = cloud.up()
    assert code == 75 and "the same command follows it" in printed
    assert "delete" not in cloud.verbs()
    calls, job = len(cloud.calls()), cloud.record()["job"]
    cloud.script(status=[{**RUNNING, "job": job, "offset": 4}, {"job": job}])
    code, printed = cloud.up()
    assert code == 0 and "it is followed" in printed
    later = [call["verb"] for call in cloud.calls()[calls:]]
    assert not {"create", "scp", "prepare", "start"} & set(later) and later[-1] == "delete"
    assert len(cloud.record()["active"]) == 1  # one time that is paid


def test_a_job_that_ran_is_not_set_up_anew_because_hosts_are_silent(cloud, monkeypatch):
    cloud.script(status=[RUNNING])
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        cloud.up()
    calls, job, lost = len(cloud.calls()), cloud.record()["job"], {"err": "timed out"}
    cloud.script(status=[lost])
    code, printed = cloud.up()
    assert code == 1 and "do not answer" in printed
    assert cloud.up("--config.seed=5")[0] == 1  # another job neither
    assert {call["verb"] for call in cloud.calls()[calls:]} == {"describe", "status"}
    cloud.script(status=[lost, lost, {**RUNNING, "job": job}, {"job": job}])
    assert cloud.up()[0] == 0
    assert [call["verb"] for call in cloud.calls()].count("prepare") == 1


def test_another_job_of_that_name_is_left_alone(cloud):
    (cloud.folder / "there").touch()
    cloud.script(status=[{**RUNNING, "job": "another"}])
    code, printed = cloud.up()
    assert code == 2 and "runs another job" in printed
    assert cloud.verbs() == ["describe", "status"]


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "ACTIVE"])
def test_ctrl_c_before_the_job_runs_gives_back(cloud, monkeypatch, state):
    cloud.script(describe=[state], scp=[{"err": "not yet"}])
    interrupt(monkeypatch, at=2)
    code, _ = cloud.up()
    assert code == 75 and cloud.verbs()[-1] == "delete"


def test_a_run_is_stopped_at_its_most_cost(cloud):
    cloud.script(status=[RUNNING])
    code, printed = cloud.up("--price=1e9", "--max_cost=1")
    assert code == 75 and "--max_cost is 1" in printed
    assert cloud.verbs()[-3:] == ["stop", "status", "delete"]


def test_stop_lets_it_save_deletes_and_may_be_repeated(cloud, monkeypatch):
    cloud.script(status=[RUNNING])
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        cloud.up("--price=2")
    for asked in (["describe", "stop", "delete"], ["describe", "delete"]):
        calls = len(cloud.calls())
        code, printed = cloud.launch("stop", "--name=a", "--poll=0")
        assert code == 0 and "deleted" in printed
        assert [call["verb"] for call in cloud.calls()[calls:]] == asked
    assert cloud.launch("stop", "--name=unknown")[0] == 2


def test_an_up_whose_launch_is_stopped_asks_for_nothing_more(cloud, monkeypatch):
    cloud.script(status=[RUNNING])
    waits = iter(range(1, 100))

    def sleep(seconds):
        if next(waits) == 3:
            (cloud.records / "a.stop").touch()
            (cloud.folder / "there").unlink()

    monkeypatch.setattr(tpu, "_wait", sleep)
    assert cloud.up()[0] == 75
    assert cloud.verbs().count("create") == 1


def test_status_and_logs(cloud, monkeypatch):
    cloud.script(status=[RUNNING])
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        cloud.up("--price=2.5", "--spot")
    row = {"run": "a", "step": 40, "eval/loss": 3.25}
    report = {**RUNNING, "row": row, "log": "all of it\n"}
    cloud.script(status=[report], status_of_all=[report])
    code, printed = cloud.launch("status", "--name=a")
    assert code == 0
    for words in ("ACTIVE", "v5e-16 (spot, 4 hosts, 16 chips)", "a: step 40, eval/loss 3.2500",
                  "4 of 4 hosts answer, the job is running", "at 2.5 each"):  # fmt: skip
        assert words in printed, printed
    assert cloud.launch("logs", "--name=a") == (0, "all of it\n")
    cloud.script(describe=["SUSPENDED"])
    assert "SUSPENDED" in cloud.launch("status", "--name=a")[1]
    assert cloud.launch("status", "--name=../a")[0] == 2


def test_costs_are_counted_while_slices_are_there():
    known = record.Record(
        Target("a", "my-project", "us-west4-a", "v5e-16", 2, price=1.5), "gs://b/x"
    )
    known.begin_active(1000.0)
    known.still_active(1000.0 + 1800)
    known.begin_active(9000.0)
    known.still_active(9000.0 + 900)
    assert known.chip_hours == 0.75 * 32 and known.cost == 1.5 * 0.75 * 32


def test_a_dry_run_shows_all_and_calls_nothing(cloud, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    words = ("--secret=HF_TOKEN", "--spot", "--slices=2", "--price=1", "--max_cost=5")
    code, shown = cloud.up("--dry_run", *words)
    assert code == 0 and not cloud.calls() and not list(cloud.records.glob("*.json"))
    assert "HF_TOKEN=***" in shown and "canary" not in shown
    cloud.script(status=[RUNNING, CRASHED, None], status_of_all=[CRASHED, None])
    assert cloud.up(*words)[0] == 0
    lines = [shlex.split(line.split("  < ")[0]) for line in shown.splitlines() if line[0] != "#"]
    for call in cloud.calls():  # it was all announced, word for word but for two
        made = ["gcloud", *call["words"]]
        if call["verb"] == "scp":
            made[5] = pathlib.Path(made[5]).name
        assert made in lines, made


@pytest.mark.parametrize(
    "option",
    ["--name=a; rm -rf ~", "--name=a b", "--name=a'b", "--name=--zone", "--name=A", "--name=a/../b",
     "--project=p;x", "--zone=us west4", "--zone=", "--topology=v5e-17", "--topology=2xv5e-16",
     "--slices=0", "--workdir=/somewhere", "--workdir=gs://a b/c", "--workdir=gs://bucket/../x",
     "--workdir=gs://bucket/a\nb", "--target=aws", "--max_cost=1", "--price=-1", "--price=nan",
     "--config=nowhere.py", "--config.model.widht=3", "--sweep=unknown"],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_asked_for(cloud, option):
    code, printed = cloud.up(option)
    assert code == 2 and printed.startswith("error: "), printed
    assert printed.count("\n") == 1
    assert not cloud.calls()


def test_strange_paths_and_values_come_through(cloud):
    workdir = "gs://my-bucket/a b/'; rm -rf ~; echo \"$HOME"
    prompt = "it's; `a` $(test)"
    code, printed = cloud.up(f"--workdir={workdir}", f"--config.train.wandb={prompt}")
    assert code == 0, printed
    words = job_of(cloud.folder / "archive")["runs"][0]["arguments"]
    assert f"--config.train.wandb={prompt}" in words
    assert f"--workdir={mounted(workdir)}" in words
    # No command for a shell has any of it.
    assert not [call for call in cloud.calls() if "$" in "".join(call["words"])]
    lines = [["rm", "-rf", "it's; $HOME"], ["echo", 'a "b"', "*"]]
    first, second = remote(*lines).split(" && ")
    assert [shlex.split(first), shlex.split(second)] == lines


def test_code_is_shipped_by_commit(packed, tmp_path):
    (packed.repository / "second.py").write_text("new = 1\n")
    commit(packed.repository)
    assert packed.up()[0] == 0
    with tarfile.open(packed.folder / "archive") as tar:
        assert {member.uname for member in tar} == {""}
        tar.extractall(tmp_path / "host", filter="data")
    code = tmp_path / "host" / "code"
    assert git(code, "rev-parse", "HEAD") == git(packed.repository, "rev-parse", "HEAD")
    assert git(code, "rev-list", "HEAD").count("\n") == 1  # the history stays here
    assert not git(code, "status", "--porcelain") and not git(code, "remote")
    texts = [path.read_text() for path in (code / ".git").glob("*") if path.is_file()
             if path.name != "index"]  # fmt: skip
    assert texts and not [text for text in texts if str(packed.repository) in text]


def test_what_is_not_committed_is_refused_or_shipped_as_a_diff(packed, tmp_path):
    (packed.repository / "config.py").write_text("# changed\n" + (
        packed.repository / "config.py").read_text())  # fmt: skip
    (packed.repository / "bytes").write_bytes(bytes(range(256)))
    git(packed.repository, "add", "config.py")
    code, printed = packed.up()
    assert code == 2 and "bytes, config.py: not committed" in printed.replace(
        "config.py, bytes", "bytes, config.py"
    )
    assert not packed.calls()
    before = git(packed.repository, "status", "--porcelain")
    assert packed.up("--allow_dirty")[0] == 0
    assert git(packed.repository, "status", "--porcelain") == before  # nothing was staged
    with tarfile.open(packed.folder / "archive") as tar:
        tar.extractall(tmp_path / "host", filter="data")
    code = tmp_path / "host" / "code"
    assert (code / "bytes").read_bytes() == bytes(range(256))
    # What a receipt holds: the commit, and all of the difference to it.
    assert git(code, "rev-parse", "HEAD") == git(packed.repository, "rev-parse", "HEAD")
    diff = git(code, "diff", "HEAD")
    assert "+# changed" in diff and "bytes" in diff
    assert "and a diff of" in packed.record()["code"]


def test_a_config_outside_of_the_repository_is_refused(cloud, tmp_path):
    path = tmp_path / "other.py"
    path.write_text((cloud.repository / "config.py").read_text())
    code, printed = cloud.up(f"--config={path}")
    assert code == 2 and "not in the repository" in printed


_NOBODY = "You do not currently have an active account selected.\nPlease run:\n gcloud auth login"


@pytest.mark.parametrize("text", [_NOBODY, "PERMISSION_DENIED: no"])
def test_who_is_not_let_in_is_told_at_once(cloud, text):
    (cloud.folder / "there").touch()
    cloud.script(describe=[{"err": text}])
    code, printed = cloud.up()
    assert code == 1 and text.splitlines()[0] in printed
    assert cloud.verbs() == ["describe"] and len(cloud.calls()) == 1


def test_one_up_at_a_time(cloud):
    with record.held(cloud.records, "a"):
        code, printed = cloud.up()
    assert code == 2 and "another `launch up`" in printed and not cloud.calls()


def test_without_gcloud(cloud, monkeypatch):
    tools = cloud.folder / "tools"
    tools.mkdir()
    (tools / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tools))
    code, printed = cloud.up()
    assert code == 2 and printed.splitlines()[-1].startswith("error: gcloud: is not on the PATH")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs the Google Cloud SDK")
def test_the_real_gcloud_knows_all_words(cloud, monkeypatch, tmp_path):
    """It reads each command, and refuses only that nobody is logged in: no network is used."""
    real = shutil.which("gcloud", path=os.environ["PATH"].partition(":")[2])
    monkeypatch.setenv("HF_TOKEN", CANARY)
    words = ("--dry_run", "--secret=HF_TOKEN", "--price=1", "--max_cost=5", "--max_wait=6")
    shown = [cloud.up(*words, "--spot", "--slices=2")[1], cloud.up(*words, "--reserved")[1]]
    lines = {x.split("  < ")[0] for text in shown for x in text.splitlines() if x[0] != "#"}
    assert len(lines) > 15
    environment = {
        **os.environ,
        "CLOUDSDK_CONFIG": str(tmp_path / "nobody"),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
    }
    for line in [*sorted(lines), "gcloud compute tpus queued-resources delete a --nosuchflag"]:
        command = [real, *shlex.split(line)[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, input="")
        refused = "unrecognized arguments" in done.stderr
        assert refused == ("nosuchflag" in line), done.stderr
        assert refused or "active account" in done.stderr, (line, done.stderr)
