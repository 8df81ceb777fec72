"""The processes of one start of a command, on this machine: started together, ended together."""

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from gpt_jax.parallel.processes import Processes
from gpt_jax.train.interrupts import INTERRUPTED, Interrupts
from gpt_jax.train.watchdog import STALLED

FINISHED, FAILED, USER_MISTAKE = 0, 1, 2
_EXPECTED = (FINISHED, USER_MISTAKE, INTERRUPTED)
_TICK = 0.1  # seconds
_GRACE = 20.0  # seconds that the others have to end, and to say what they know
_PR_SET_PDEATHSIG = 1


def commands(command: Sequence[str], processes: Processes) -> list[list[str]]:
    """One command for each process that is to be started here, at a port of this start.

    All of them are, where only their number is given; else one, which finds the others itself.
    """
    here = not (processes.auto or processes.coordinator or processes.process_id >= 0)
    if not here or processes.num_processes <= 1:
        return [[*command, *processes.words()]]
    with socket.socket() as probe:  # free now, and so most likely in a moment
        probe.bind(("127.0.0.1", 0))
        place = f"--coordinator=127.0.0.1:{probe.getsockname()[1]}"
    words = [*processes.words(), place]
    return [[*command, *words, f"--process_id={i}"] for i in range(processes.num_processes)]


def run_together(
    commands: Sequence[Sequence[str]],
    interrupts: Interrupts,
    workdir: pathlib.Path,
    say: Callable[[str], None],
) -> int:
    """Runs commands until all have ended; when one crashes the others are ended too.

    Args:
      commands: Of the processes, in their order.
      interrupts: What was asked of us is asked of them.
      workdir: The run directory, whose events say where a process was.
      say: Takes the lines for people.

    Returns:
      An exit code, or minus a signal: of the first that crashed; else USER_MISTAKE or INTERRUPTED
      if one ended so; else FINISHED.
    """
    # Ctrl-C in a terminal is for us, who pass it on.
    started = [
        subprocess.Popen(x, start_new_session=True, preexec_fn=end_with_parent()) for x in commands
    ]

    def say_lost(process: int) -> None:
        if len(started) > 1:
            say(_lost(process, started[process], workdir))

    told, crashed, first_end = False, None, None
    try:
        while any(process.poll() is None for process in started):
            if interrupts.requested and not told:
                for process in started:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
                told = True
            ended = [i for i, process in enumerate(started) if process.poll() is not None]
            if crashed is None and (crashed := _crashed(started)) is not None:
                say_lost(crashed)
            if ended and first_end is None:
                first_end = time.monotonic()
            if first_end and time.monotonic() - first_end > _GRACE:
                for i, process in enumerate(started):
                    if process.poll() is None:
                        say(f"supervisor: process {i} did not end with the others, and is ended")
                        process.kill()
            time.sleep(_TICK)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process in started]
    if crashed is None and (crashed := _crashed(started)) is not None:
        say_lost(crashed)
    if crashed is not None:
        return codes[crashed]
    return next((code for code in (USER_MISTAKE, INTERRUPTED) if code in codes), FINISHED)


def _crashed(started: Sequence[subprocess.Popen]) -> int | None:
    """The process that crashed; of several that are found at once, the one that is to blame.

    The loss of another makes a process end with an exit code, or the runtime abort it.
    """
    codes = {i: process.poll() for i, process in enumerate(started)}
    bad = [i for i, code in codes.items() if code is not None and code not in _EXPECTED]
    return min(bad, key=lambda i: (codes[i] == -signal.SIGABRT, codes[i] >= 0), default=None)


def in_words(code: int) -> str:
    """An exit code, or minus a signal."""
    if code < 0:
        return signal.Signals(-code).name
    hung = " (train.stall_timeout: it hung)" if code == STALLED else ""
    return f"exit code {code}{hung}"


def _lost(process: int, ended: subprocess.Popen, workdir: pathlib.Path) -> str:
    return (
        f"supervisor: process {process} on {socket.gethostname()} (pid {ended.pid}) was lost: "
        f"{in_words(ended.returncode)}{_last_seen(workdir, process)}; the others end with it"
    )


def _last_seen(workdir: pathlib.Path, process: int) -> str:
    """The step of the last thing that a process wrote of itself."""
    name = f"events-{process}.jsonl" if process else "events.jsonl"
    with contextlib.suppress(OSError, ValueError, IndexError):
        last = json.loads((workdir / name).read_text().splitlines()[-1])
        if "phase" in last:
            return f", last heard of at step {last['step']} (phase {last['phase']!r})"
    return ""


def end_with_parent() -> Callable[[], None]:
    """What a child does before it begins: it saves and ends when we are killed outright (Linux)."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        # Our handler, which it has until the command runs, would swallow the signal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if libc:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(INTERRUPTED)

    return prepare
