"""Runs generated Python programs in a subprocess with limits, only where a person allowed it.

What is a barrier, held by the kernel (Linux with Landlock and seccomp, as `barriers` reports):
files outside of the program's own folder can be neither read (but for Python's library) nor
written; there are no sockets, no other processes, no signals, no change of rights; memory, CPU
time, open files and the size of each file are limited.  The environment is empty, and the parent
kills what outlives the time limit.

What is a fence: on other systems an audit hook refuses the same calls, which a program that means
harm can walk around.  And everywhere the program shares a process with what judges it: one that
leaves early (`sys.exit(0)`) does not pass, but one that was written to deceive could.  Nothing
limits how many small files the program writes within its time; they go when it ends.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
BARRIERS = ("files", "calls")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      seconds: Wall-clock and CPU time.
      memory_mb: Address space, the interpreter's own 20 MB included.
      file_mb: Size of each file that it writes, and of what it prints.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      passed: It ran to its last line.
      reason: "" or what went wrong: "time limit", the exception, the signal.
      output: What it printed, cut at 2,000 characters.
    """

    passed: bool
    reason: str
    output: str = ""


def run_program(
    source: str, limits: Limits = Limits(), *, allow_code_execution: bool = False
) -> Outcome:
    """Runs a program; tests in it fail by raising.

    Raises:
      ValueError: without allow_code_execution, or where subprocesses cannot be limited.
    """
    check_allowed(allow_code_execution)
    return _run(source, limits)


def run_programs(
    sources: Sequence[str], limits: Limits = Limits(), *, allow_code_execution: bool = False
) -> list[Outcome]:
    """run_program for each, as many at a time as there are cores.

    Raises:
      ValueError: as run_program.
    """
    check_allowed(allow_code_execution)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: _run(source, limits), sources))


def check_allowed(allow_code_execution: bool) -> None:
    """Raises ValueError unless programs may run; warns where only a fence can be put up."""
    if not allow_code_execution:
        raise ValueError(
            "allow_code_execution: False: programs that a model wrote are run only with "
            "--allow_code_execution"
        )
    if os.name != "posix":
        raise ValueError("allow_code_execution: this system cannot limit a subprocess")
    missing = [name for name in BARRIERS if name not in barriers()]
    if missing:
        warnings.warn(
            f"allow_code_execution: this system has no barrier around {' and '.join(missing)}: "
            "a fence stops accidents, not attacks",
            stacklevel=3,
        )


@functools.cache
def barriers() -> tuple[str, ...]:
    """Which of BARRIERS the kernel holds here."""
    outcome = _run("", Limits(), report=True)
    return tuple(json.loads(outcome.output)) if outcome.passed else ()


def _run(source: str, limits: Limits, report: bool = False) -> Outcome:
    # No fixed exit status means success: a program that leaves by itself has not passed.
    success = 64 + secrets.randbelow(50)
    order = {"limits": dataclasses.asdict(limits), "success": success, "report": report}
    message = f"{json.dumps(order)}\n{source}".encode("utf-8", "replace")
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)]
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
    ):
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            child.communicate(message, timeout=limits.seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(child)
        out.seek(0)
        text = out.read(limits.file_mb << 20).decode("utf-8", "replace")
    if late or child.returncode == -signal.SIGXCPU:
        return Outcome(False, "time limit", text[:2000])
    if child.returncode == success:
        return Outcome(True, "", text[:2000])
    return Outcome(False, _reason(child.returncode, text), text[:2000])


def _kill(child: subprocess.Popen) -> None:
    """The whole session; the child's group is still its own, as it is not yet waited for."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _reason(returncode: int, text: str) -> str:
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    lines = text.strip().splitlines()
    return lines[-1][:500] if returncode == 1 and lines else f"exit status {returncode}"
