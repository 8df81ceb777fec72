"""Python processes that begin with what training needs imported: most of a small run's start.

One process imports it, once, and is copied for each (on Linux; elsewhere each imports for itself).
Nothing of JAX has run in it: no device is known and no thread is alive.  Starts no JAX here.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

from gpt_jax.parallel.cache_folder import keep_libraries_files
from gpt_jax.parallel.host_memory import keep_freed_memory

Process = ForkServerProcess | SpawnProcess
_IMPORTED = [
    "gpt_jax.cli.train", "gpt_jax.parallel.startup", "gpt_jax.train.loop", "grain",
    "gpt_jax.scaling.commands", "scipy.optimize", "gpt_jax.reports.report", "matplotlib.figure",
]  # fmt: skip


@functools.cache
def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    keep_libraries_files()  # before they are imported
    # NumPy's threads would not be there in a copy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def start(
    command: Sequence[str], *, log: os.PathLike | None = None, cores: set[int] | None = None
) -> Process:
    """Starts a process; it is asked to end (SIGTERM) when this one ends without it.

    Args:
      command: As after `python`: "-m" and a module, or a file; and its words.
      log: A file that its output is added to; it then hears nothing of a terminal's Ctrl-C. None:
        it writes where we do.
      cores: Those that it may use; None: any.
    """
    process = _context().Process(
        target=_be, args=(list(command), log, cores, os.getcwd(), dict(os.environ))
    )
    process.start()
    return process


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _be(
    command: list[str],
    log: os.PathLike | None,
    cores: set[int] | None,
    folder: str,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    keep_freed_memory()  # by the environment, and before the first thread
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    os.chdir(folder)
    if cores:
        os.sched_setaffinity(0, cores)  # XLA then makes as many threads
    if log is not None:
        os.setsid()
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    run(command)


def run(command: Sequence[str]) -> None:
    """Does here what a process of `start` would do."""
    is_module = command[0] == "-m"
    sys.argv = list(command[is_module:])
    run_it: Callable[..., Any] = runpy.run_module if is_module else runpy.run_path
    run_it(sys.argv[0], run_name="__main__")
