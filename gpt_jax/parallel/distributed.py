"""Starting as one of several processes, and ending as one of them."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import jax

from gpt_jax.parallel.peers import Peers
from gpt_jax.parallel.processes import ALONE, Processes

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_alone = Peers()
_peers = _alone


def peers() -> Peers:
    """The processes that this one is part of: those of `running`, or of jax.distributed."""
    global _peers
    if _peers is _alone and jax.distributed.is_initialized() and jax.process_count() > 1:
        _peers = _make_peers(ALONE)
    return _peers


@contextlib.contextmanager
def running(processes: Processes) -> Iterator[Peers]:
    """A context in which the process is one of several; before JAX's first computation.

    Collectives between CPUs go through Gloo. When the context is left without an error all wait for
    each other; with one, the others are told, and `leave` must end the process.

    Args:
      processes: How the others are found.

    Raises:
      ValueError: The cluster does not say what is missing.
    """
    global _peers
    processes.check_complete()
    if not processes.together:
        yield _alone
        return
    _initialize(processes)
    prefix = f"[{socket.gethostname()}/{jax.process_index()}] "
    sys.stdout, sys.stderr = Prefixed(sys.stdout, prefix), Prefixed(sys.stderr, prefix)
    _peers = _make_peers(processes)
    try:
        yield _peers
        _peers.close()
        jax.distributed.shutdown()
        _peers = _alone
    finally:
        sys.stdout, sys.stderr = (
            x.stream if isinstance(x, Prefixed) else x for x in (sys.stdout, sys.stderr)
        )


def leave(error: BaseException, code: int, seconds: float = 10.0) -> None:
    """Ends the process after an error, told to people by now; does not return.

    The others are told. Process 0, whose end would end them before they have said what they know,
    waits a little for theirs. JAX's own way out would wait for all of them.
    """
    told = _peers
    told.fail(" ".join(str(error).split()) or type(error).__name__, code)
    deadline = time.monotonic() + seconds
    while told.is_first and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if len(told.failures()) == told.count:
                time.sleep(0.2)  # they are on their way
                break
        time.sleep(0.1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _initialize(processes: Processes) -> None:
    # Who is told to end by a signal agrees with the others in train/interrupts.py: JAX's service
    # for that would take SIGTERM for itself and know nothing of Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The service has no keys: on loopback nobody else is to reach it.
    host = processes.coordinator.rpartition(":")[0]
    bind = processes.coordinator if host in _LOOPBACK else None
    try:
        jax.distributed.initialize(
            coordinator_address=processes.coordinator or None,
            num_processes=processes.num_processes or None,
            process_id=processes.process_id if processes.process_id >= 0 else None,
            cluster_detection_method=None if processes.auto else "deactivate",
            heartbeat_timeout_seconds=processes.heartbeat_timeout,
            coordinator_bind_address=bind.replace("localhost", "127.0.0.1") if bind else None,
        )
    except ValueError as error:
        if not processes.auto:
            raise
        raise ValueError(
            "--distributed: 'auto' found no TPU pod, SLURM, Kubernetes or Open MPI that says who "
            f"is there ({error}); give --coordinator, --num_processes and --process_id"
        ) from None


def _make_peers(processes: Processes) -> Peers:
    beat = max(0.5, min(5.0, processes.heartbeat_timeout / 5))
    return Peers(
        _client(), jax.process_index(), socket.gethostname(), jax.process_count(),
        timeout=processes.barrier_timeout, beat=beat,
    )  # fmt: skip


def _client():
    # JAX has no public name for it; its own documents use this one.
    from jax._src.distributed import global_state

    return global_state.client


class Prefixed:
    """A text stream that begins each line with who writes it.

    Args:
      stream: Where it goes.
      prefix: What a line begins with.
    """

    def __init__(self, stream: TextIO, prefix: str):
        self.stream, self._prefix, self._fresh = stream, prefix, True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        out = "".join(
            (self._prefix if self._fresh or i else "") + line for i, line in enumerate(lines)
        )
        if lines:
            self._fresh = lines[-1].endswith(("\n", "\r"))
        self.stream.write(out)  # in one piece: other processes may write to the same terminal
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
