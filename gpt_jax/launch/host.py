"""What runs on a host of a launch: starts the job, tells how far it is, stops it.  Starts no JAX.

  python -m gpt_jax.launch.host start|status|stop|restart|run FOLDER

FOLDER has job.json and, if there are secrets, `env`, a JSON object of environment variables.
`start` leaves a process behind that does what `run` does, with its output in FOLDER/log.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.launch.group import FAILED, FINISHED, INTERRUPTED, USER_MISTAKE
from gpt_jax.launch.job import Job, read_job
from gpt_jax.launch.run_folder import halted_at, newest_step, read_receipt
from gpt_jax.launch.standing import last_line
from gpt_jax.train.interrupts import Interrupts

MARK = "gpt-jax-host: "  # what `status` prints begins with it
_TO_STOP = 120.0  # seconds that a run has to save
_TICK = 0.1
_MOST_LOG = 200_000  # bytes of the log in one status


def run(folder: pathlib.Path) -> tuple[int, bool]:
    """Runs the job's runs, and leaves `ended.json`: how it ended.

    Returns:
      The code: FINISHED, also where runs of a sweep diverged; INTERRUPTED: the run under way has
      saved; USER_MISTAKE: another start would repeat it; FAILED. Of a sweep all runs are tried
      first. And whether it failed because the run halted for a loss that is not finite.
    """
    job, codes, halted = read_job(folder), [], False
    with Interrupts() as interrupts:
        for number, one in enumerate(job.runs, start=1):
            workdir = pathlib.Path(one.workdir)
            if job.sweep:
                print(f"{one.name}: begins ({number} of {len(job.runs)})", flush=True)
            if job.sweep and halted_at(read_receipt(workdir)):
                print(f"{one.name}: diverged before; remove its folder to try again", flush=True)
                continue
            before = read_receipt(workdir)
            code = _train(one.arguments, _secrets(folder), interrupts)
            after = read_receipt(workdir)
            if interrupts.requested or code == INTERRUPTED:
                codes.append(INTERRUPTED if code in (FINISHED, INTERRUPTED) else FAILED)
                break
            if code == FAILED and after != before and halted_at(after):
                halted = True
                code = FINISHED if job.sweep else FAILED
            codes.append(code)
    code = _worst(codes)
    halted = halted and code == FAILED
    _write(folder / "ended.json", {"code": code, "halted": halted})
    return code, halted


def _train(arguments: Sequence[str], secrets: Mapping[str, str], interrupts: Interrupts) -> int:
    """Runs `gpt-jax train`, which is asked to save when we are asked to end; its exit code."""
    command = [sys.executable, "-m", "gpt_jax", "train", *arguments]
    process = subprocess.Popen(command, env={**os.environ, **secrets})
    told = False
    while process.poll() is None:
        if interrupts.requested and not told:
            process.send_signal(signal.SIGTERM)
            told = True
        time.sleep(_TICK)
    return process.returncode


def _worst(codes: Sequence[int]) -> int:
    """The code of all: what can be got on with counts more than what cannot."""
    if INTERRUPTED in codes:
        return INTERRUPTED
    if any(code not in (FINISHED, USER_MISTAKE) for code in codes):
        return FAILED
    return USER_MISTAKE if USER_MISTAKE in codes else FINISHED


def start(folder: pathlib.Path) -> None:
    """Leaves a process behind that runs the job; none if one is at it."""
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        (folder / "ended.json").unlink(missing_ok=True)
        with open(folder / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpt_jax.launch.host", "run", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # the lock is held for as long as the process lives
            )
        _write(folder / "runner.json", {"pid": process.pid})


def status(folder: pathlib.Path, offset: int | None) -> dict[str, Any]:
    """How far the job is.

    Args:
      folder: Of the job.
      offset: From which byte of the log on it is given; None: without.

    Returns:
      job: its id. state: "running", "ended" or "none". code, halted: of the end. progress: grows
      when any run has a newer checkpoint. row: the last of the metrics of the run that has written
      last. log, offset: text without the values of secrets, and where it ends.
    """
    job = read_job(folder)
    ended = folder / "ended.json"
    report = {"job": job.id, "state": "none", "code": None, "halted": False}
    if _is_running(folder):
        report["state"] = "running"
    elif ended.exists():
        report |= {"state": "ended", **json.loads(ended.read_text())}
    elif (folder / "runner.json").exists():  # it was killed
        report |= {"state": "ended", "code": FAILED}
    steps = [newest_step(pathlib.Path(one.workdir)) for one in job.runs]
    report["progress"] = sum(step + 1 for step in steps)
    report["row"] = _last_row(job)
    if offset is not None:
        log, report["offset"] = _log(folder / "log", offset, report["state"] == "running")
        report["log"] = _mask(log, _secrets(folder))
    return report


def stop(folder: pathlib.Path, seconds: float = _TO_STOP) -> None:
    """Asks the job to save and end, waits for it, and kills what is left of it."""
    runner = folder / "runner.json"
    if not runner.exists():
        return
    pid = json.loads(runner.read_text())["pid"]
    if _is_running(folder):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while _is_running(folder) and time.monotonic() < deadline:
        time.sleep(_TICK)
    # The process and the run that it started, also where only one of them is left.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    while _is_running(folder):
        time.sleep(_TICK)
    runner.unlink()


def _is_running(folder: pathlib.Path) -> bool:
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _last_row(job: Job) -> dict[str, Any] | None:
    paths = [pathlib.Path(one.workdir) / "metrics.jsonl" for one in job.runs]
    paths = [path for path in paths if path.exists()]
    if not paths:
        return None
    path = max(paths, key=lambda path: path.stat().st_mtime)
    try:
        row = json.loads(last_line(path))
    except ValueError:  # it is being written
        return None
    return {"run": path.parent.name, **row}


def _log(path: pathlib.Path, offset: int, growing: bool) -> tuple[str, int]:
    """The log from a byte on, and where that ends; of one that is growing whole lines."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            offset = max(offset if offset <= size else 0, size - _MOST_LOG)
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return "", 0
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    return content.decode(errors="replace"), offset + len(content)


def _mask(text: str, secrets: Mapping[str, str]) -> str:
    """The text with the values of secrets replaced: here alone all are known who asks for it."""
    for value in secrets.values():
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, "***")
    return text


def _secrets(folder: pathlib.Path) -> dict[str, str]:
    path = folder / "env"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    # Several tasks of one job may share the folder.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values))
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """One of the commands of the module's docstring; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpt_jax.launch.host")
    parser.add_argument("command", choices=("start", "status", "stop", "restart", "run"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--log", type=int, metavar="OFFSET", help="status: the log from there on")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.absolute()
    if arguments.command == "run":
        code, halted = run(folder)
        return USER_MISTAKE if halted else code  # a scheduler need not try that again
    if arguments.command == "status":
        print(MARK + json.dumps(status(folder, arguments.log)), flush=True)
    if arguments.command in ("stop", "restart"):
        stop(folder)
    if arguments.command in ("start", "restart"):
        start(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
