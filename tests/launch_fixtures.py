"""A `gcloud` that keeps what it is told and answers from a script, and a repository to ship."""

import ast
import atexit
import contextlib
import functools
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

from gpt_jax.cli import main as cli
from gpt_jax.launch import commands, tpu
from gpt_jax.launch.host import MARK

CONFIG = """
from configs.gpt import get_config as gpt

def get_config(argument=None):
    return gpt("size=100k,debug")

def sweep_seeds():
    yield {"name": "a", "seed": 1}
    yield {"name": "b", "seed": 2, "init.source": "{sweep}/a"}
"""
# What it is asked for is read off its words. Of the answers of a verb each is given once, the last
# for ever: a state of `describe`, a report of `status`, an error {"err": text} of any.
_GCLOUD = """#!{python} -IS
import os, sys  # nothing that takes time to import: it is started hundreds of times
folder = {folder!r}
there = folder + "/there"
words, stdin = sys.argv[1:], sys.stdin.read()
verb = words[3]
if words[2] == "tpu-vm":
    verb = "describe_slice"
command = words[-1].removeprefix("--command=")
if verb == "ssh":
    last = [word for word in command.split() if not word.startswith(("--", ".."))][-1]
    verb = "env" if "cat >" in command else "prepare" if "host_setup" in command else last
    if verb == "status" and "--worker=all" in words:
        verb = "status_of_all"
with open(folder + "/calls", "a") as file:
    file.write(repr({{"verb": verb, "words": words, "stdin": stdin}}) + "\\n")
if verb in ("describe", "delete") and not os.path.exists(there):
    sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'queuedResources/a' was not found")
with open(folder + "/script") as file:
    script = eval(file.read())
answers = script.get(verb) or ["" if verb != "describe_slice" else script["four"]]
number = folder + "/number-" + verb
at = os.path.getsize(number) if os.path.exists(number) else 0
with open(number, "a") as file:
    file.write("x")
answer = answers[min(at, len(answers) - 1)]
if answer.startswith("ERROR"):
    sys.exit(answer)
if verb == "create":
    open(there, "x").close()
if verb == "delete":
    os.unlink(there)
if verb == "describe":
    print(answer or script["active"])
if verb == "describe_slice":
    print(answer)
if verb == "scp":
    with open(words[4], "rb") as file, open(folder + "/archive", "wb") as copy:
        copy.write(file.read())
if verb.startswith("status"):
    print("SSH: Attempting to connect to worker 0...")
    print("\\n".join([answer or script["ended"]] * (4 if verb == "status_of_all" else 1)))
"""
_REPORT = {
    "job": "?", "state": "ended", "code": 0, "halted": False, "progress": 0, "row": None,
    "log": "", "offset": 0,
}  # fmt: skip


def _answer(verb: str, answer) -> str:
    """As the fake prints it."""
    if answer is None:
        return ""
    if isinstance(answer, dict) and "err" in answer:
        return f"ERROR: (gcloud.compute.tpus) {answer['err']}"
    if verb == "describe":
        return json.dumps(answer if isinstance(answer, dict) else {"state": {"state": answer}})
    if verb == "describe_slice":
        return json.dumps({"state": "READY", "networkEndpoints": [{}] * answer})
    return MARK + json.dumps(_REPORT | answer)


class Cloud:
    """The fake, and the command line in front of it."""

    def __init__(self, folder: pathlib.Path, monkeypatch):
        self.folder, self.records = folder / "cloud", folder / "records"
        self.folder.mkdir()
        program = self.folder / "bin" / "gcloud"
        program.parent.mkdir()
        program.write_text(_GCLOUD.format(python=sys.executable, folder=str(self.folder)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        self.script()
        self.repository = pathlib.Path(shutil.copytree(_repository(), folder / "repository"))
        monkeypatch.setattr(commands, "_PACKAGE", self.repository)
        monkeypatch.setattr(tpu, "_wait", self._wait)
        self._waits = 0
        # Packing takes longer than all else; those that are about it undo this.
        monkeypatch.setattr(commands, "pack", _job_alone)

    def _wait(self, seconds: float) -> None:
        """No test has to wait; one that would for ever fails."""
        self._waits += 1
        assert self._waits < 100

    def script(self, **answers) -> None:
        """What it answers from now on."""
        answers = {verb: [_answer(verb, x) for x in given] for verb, given in answers.items()}
        usual = {
            "active": _answer("describe", "ACTIVE"),
            "four": _answer("describe_slice", 4),
            "ended": _answer("status", {}),
        }
        (self.folder / "script").write_text(repr(answers | usual))
        for number in self.folder.glob("number-*"):
            number.unlink()

    def calls(self) -> list[dict]:
        path = self.folder / "calls"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [ast.literal_eval(line) for line in lines]

    def verbs(self) -> list[str]:
        """What it was asked for, in order; the same in a row once."""
        verbs = [call["verb"] for call in self.calls()]
        return [verb for i, verb in enumerate(verbs) if not i or verbs[i - 1] != verb]

    def up(self, *words: str) -> tuple[int, str]:
        given = {
            "--name": "a", "--config": str(self.repository / "config.py"), "--workdir":
            "gs://my-bucket/runs/a", "--topology": "v5e-16", "--zone": "us-west4-a",
            "--project": "my-project", "--poll": "0", "--out": str(self.records / "out"),
        }  # fmt: skip
        flags = [word for word in words if not word.startswith(tuple(f"{x}=" for x in given))]
        given |= dict(word.split("=", 1) for word in words if word not in flags)
        return self.launch("up", *(f"{k}={v}" for k, v in given.items()), *flags)

    def launch(self, command: str, *words: str) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                cli.main(["launch", command, *words, f"--records={self.records}"])
            except SystemExit as end:
                code = end.code
        return code, printed.getvalue()

    def record(self) -> dict:
        return json.loads((self.records / "a.json").read_text())


def _job_alone(what, job: str, archive: pathlib.Path) -> None:
    """An archive without the code."""
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("job.json")
        member.size = len(job.encode())
        tar.addfile(member, io.BytesIO(job.encode()))


@functools.cache
def _repository() -> pathlib.Path:
    """A git repository with one config and one commit; to be copied."""
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "config.py").write_text(CONFIG)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def commit(folder: pathlib.Path) -> None:
    """Commits everything."""
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    git(folder, "add", "--all")
    git(folder, *who, "commit", "--quiet", "--message=all", "--no-gpg-sign")


def git(folder: pathlib.Path, *words: str) -> str:
    """What git says."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True)
    return done.stdout.decode()
