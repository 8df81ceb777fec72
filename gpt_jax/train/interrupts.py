"""SIGTERM and Ctrl-C ask the loop to save and stop; of several processes all at the same step.

Before there is a loop, SIGTERM ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from gpt_jax.parallel.peers import Peers

INTERRUPTED = 75  # exit code: what was under way is saved, the same command continues
_TICK = 0.5  # seconds between two looks for a request


class Interrupts:
    """A context in which SIGTERM and SIGINT set `requested` instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.requested: str | None = None
        self._previous = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def boundary(self) -> str | None:
        """Called once between two steps: the name of the signal to stop for here, or None."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class SharedInterrupts(Interrupts):
    """A context in which a signal to any of the processes makes all of them stop at one boundary.

    The loops come to the same boundaries, though not at the same time. When a thread learns of the
    request it holds its loop at the next boundary, tells the others how many boundaries its loop
    has passed, and takes their numbers in: all stop at the largest of them plus one. The threads
    wait for each other and not for the loops, so it does not matter what a loop waits for; and no
    loop can have passed that boundary, as each is held until it is known. (The protocol of JAX's
    preemption service, which serves SIGTERM alone.)

    Args:
      peers: The processes.
    """

    def __init__(self, peers: Peers):
        super().__init__()
        self._peers = peers
        self._passed, self._stop_at, self._reason = 0, None, ""
        self._held = threading.Lock()  # by the thread, while it agrees with the others
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)

    def __enter__(self) -> "SharedInterrupts":
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._thread.join()
        super().__exit__()

    def boundary(self) -> str | None:
        """As of one process, but all get the same answer at the same boundary."""
        with self._held:
            self._passed += 1
            return self._reason if self._passed == self._stop_at else None

    def _watch(self) -> None:
        reason = None
        while reason is None and not self._closed.is_set():
            if self.requested:
                with contextlib.suppress(Exception):
                    self._peers.post("stop/reason", self.requested)
            reason = self._peers.wait_for("stop/reason", _TICK)
        if reason is None:
            # A loop that is done passes no boundary more, so the others need not stop.
            with contextlib.suppress(Exception):
                self._peers.post(f"stop/passed/{self._peers.index}", "done")
            return
        with self._held, contextlib.suppress(Exception):  # it breaks with the service: no stop
            passed = str(self._passed)
            self._peers.post(f"stop/passed/{self._peers.index}", passed)
            found: dict[int, str] = {}
            while len(found) < self._peers.count and not self._closed.is_set():
                time.sleep(_TICK / 10)
                found = self._peers.posted("stop/passed")
            if len(found) == self._peers.count and "done" not in found.values():
                self._stop_at = 1 + max(map(int, found.values()))
                self._reason = reason


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM ends the process with 75: nothing was trained that is not saved.

    For the time before `Interrupts` is entered, and behind it. A start may be killed at any moment
    without harm, so nothing is waited for: a restore can take longer than a host has left.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        line = f"{name}: no step is under way; the same command continues\n"
        os.write(1, line.encode())  # print might be under way
        os._exit(INTERRUPTED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
