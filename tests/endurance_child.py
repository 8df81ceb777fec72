"""Training in a process of its own that is ended, stalled or starved at a chosen place.

Whatever happens is put into the child from here; the program itself knows nothing of it.
"""

import functools
import inspect
import os
import signal
import sys
import threading
import time

import orbax.checkpoint as ocp
from orbax.checkpoint._src.handlers import base_pytree_checkpoint_handler
from orbax.checkpoint._src.path import atomicity, deleter
from orbax.checkpoint._src.serialization import jax_array_handlers

from gpt_jax.cli.main import main
from gpt_jax.evals.during_training import Evaluations
from gpt_jax.runs import checkpoints
from gpt_jax.runs.events import Phases
from gpt_jax.runs.metrics import MetricsLog
from gpt_jax.train import loop
from gpt_jax.train.progress import Progress

# Where a save is when it is killed: name -> (owner, function, before or after it).
POINTS = {
    "rows on disk": (MetricsLog, "sync", "after"),
    "folder made": (atomicity.AtomicRenameTemporaryPath, "create", "after"),
    "arrays under way": (jax_array_handlers.ArrayHandler, "serialize", "after"),
    "manifest written": (ocp.JsonCheckpointHandler, "_save_fn", "after"),
    "files not merged": (
        base_pytree_checkpoint_handler.ocdbt_utils, "merge_ocdbt_per_process_files", "before",
    ),
    "not renamed": (atomicity.AtomicRenameTemporaryPath, "finalize", "before"),
    "renamed": (atomicity.AtomicRenameTemporaryPath, "finalize", "after"),
    "not read back": (checkpoints, "read_back", "before"),
    "old step there": (deleter.StandardCheckpointDeleter, "delete", "before"),
    "old step half gone": (deleter.StandardCheckpointDeleter, "delete", "inside"),
}  # fmt: skip

# What can be stalled: all that is done in a phase, but of a step only its end.
STALLS = {
    "evaluate": (Evaluations, "run"),
    "save_wait": (checkpoints.Checkpoints, "save"),
    "step": (Progress, "step"),
}


def train(words, workdir, cache_dir, cores, plan=None):
    """Runs `gpt-jax WORDS`; what it says goes to WORKDIR.log.

    Args:
      words: The command's.
      workdir: The run directory.
      cache_dir: Where prepared data and compiled programs are kept.
      cores: What it may run on: other cores give other bits.
      plan: Of the functions below, name -> arguments.
    """
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.sched_setaffinity(0, cores)
    os.environ["GPT_JAX_CACHE"] = str(cache_dir)
    for name, arguments in (plan or {}).items():
        globals()[name](*arguments)
    began = time.monotonic()
    try:
        main(words)
    finally:
        print(f"wall: {time.monotonic() - began}", flush=True)
        sys.stdout.flush()


def wrap(owner, name, before=None, after=None, inside=None):
    """Puts calls around a function, which may be a coroutine; `inside` may call it itself."""
    whole = getattr(owner, name)

    if inspect.iscoroutinefunction(whole):

        @functools.wraps(whole)
        async def wrapped(*arguments, **named):
            if before:
                before()
            result = await whole(*arguments, **named)
            if after:
                after()
            return result

    else:

        @functools.wraps(whole)
        def wrapped(*arguments, **named):
            if before:
                before()
            call = functools.partial(whole, *arguments, **named)
            result = inside(call) if inside else call()
            if after:
                after()
            return result

    setattr(owner, name, wrapped)


def at(nth, does):
    """What does something at the n-th call."""
    calls = [0]

    def counted():
        calls[0] += 1
        if calls[0] == nth:
            does()

    return counted


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill(point, nth):
    """kill -9 at the n-th time that a save comes to a point."""
    owner, name, when = POINTS[point]
    if when != "inside":
        wrap(owner, name, **{when: at(nth, die)})
        return
    deletions = [0]

    def half(call):
        deletions[0] += 1
        if deletions[0] == nth:
            wrap(os, "unlink", before=at(4, die))
        return call()

    wrap(owner, name, inside=half)


def terminate(phase, nth, delay, stamp):
    """SIGTERM in the midst of a phase, the n-th time it is entered; when goes to a file."""

    def soon():
        time.sleep(delay)
        with open(stamp, "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)

    def linger():
        thread = threading.Thread(target=soon)
        thread.start()
        time.sleep(2 * delay)
        thread.join()

    counted, enter = at(nth, linger), Phases.enter

    def wrapped(self, entered, counts_as=""):
        enter(self, entered, counts_as)
        if entered == phase:
            counted()

    Phases.enter = wrapped


def stall(phase, nth, seconds):
    """Sleeps in the n-th batch, step, evaluation or save, and says how long that took in all."""
    sleep, asleep = at(nth, lambda: time.sleep(seconds)), [0]

    def longer(call):
        began = time.monotonic()
        sleep()
        result = call()
        asleep[0] += 1
        if asleep[0] == nth:
            print(f"\nstalled: {phase} {time.monotonic() - began}", flush=True)
        return result

    if phase != "data_wait":
        wrap(*STALLS[phase], inside=longer)
        return
    whole = loop.train_batches

    def batches(*arguments):
        inner = whole(*arguments)
        while True:
            yield longer(lambda: next(inner))

    loop.train_batches = batches


def stall_all(*stalls):
    for arguments in stalls:
        stall(*arguments)


def fill_disk(filler, left, first, last):
    """Of the disk only so many bytes are left from one save on, until another."""

    def fill():
        free = os.statvfs(os.path.dirname(filler))
        with open(filler, "wb") as file:
            file.write(bytes(free.f_bavail * free.f_frsize - left))

    wrap(checkpoints.Checkpoints, "save", before=at(first, fill))
    wrap(checkpoints.Checkpoints, "save", before=at(last, lambda: os.remove(filler)))
