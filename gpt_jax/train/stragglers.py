"""Finds the host that the others wait for, by the time each spends on its own between steps."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator

from gpt_jax.parallel.peers import Peers
from gpt_jax.runs.events import EventLog

WINDOW = 5  # steps whose median a process posts
_IN_A_ROW = 2  # windows in which it must be slow: one may be a coincidence
_LEAST_SECONDS, _LEAST_SHARE = 0.025, 0.05  # more than the others: of time, and of a step


class Stragglers:
    """Measures how long a step keeps its host busy while the devices have nothing to do.

    What a host does while its devices compute costs nothing and is not counted, nor what it waits
    for them. A host is slow if in two windows in a row its median is well above that of the others'
    medians. Devices that compute slowly are not seen: within a program all wait for each other.

    Args:
      peers: The processes; process 0 compares.
      tell: Takes (process, step, seconds more than the others) in process 0, when a host begins to
        be slow.
    """

    def __init__(self, peers: Peers, tell: Callable[[int, int, float], None]):
        self._peers, self._tell = peers, tell
        self._since, self._waited = time.monotonic(), 0.0
        self._busy: list[float] = []
        self._whole: list[float] = []
        self._window = 0
        self._slow = [0] * peers.count  # windows in a row

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time is not the host's own."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - before

    def lap(self, step: int, idle: bool) -> None:
        """A step has been dispatched.

        Args:
          step: How many have been, in all.
          idle: Whether the devices had nothing to do before it.
        """
        now = time.monotonic()
        whole = now - self._since
        busy, self._since, self._waited = whole - self._waited, now, 0.0
        if self._peers.count == 1:
            return
        self._busy.append(busy if idle else 0.0)
        self._whole.append(whole)
        if len(self._busy) == WINDOW:
            post = json.dumps([statistics.median(self._busy), statistics.median(self._whole)])
            self._peers.post(f"busy/{self._window}/{self._peers.index}", post)
            self._busy, self._whole = [], []
            # Others may be a step behind, but not a window.
            if self._peers.is_first and self._window:
                self._compare(f"busy/{self._window - 1}", step)
            self._window += 1

    def _compare(self, folder: str, step: int) -> None:
        found = {i: json.loads(x) for i, x in self._peers.posted(folder).items()}
        self._peers.forget(folder)
        if len(found) < self._peers.count:
            return
        busy = [found[i][0] for i in range(self._peers.count)]
        whole = statistics.median(x[1] for x in found.values())
        for i in range(self._peers.count):
            more = busy[i] - statistics.median(busy[:i] + busy[i + 1 :])
            is_slow = more > max(_LEAST_SECONDS, _LEAST_SHARE * whole)
            self._slow[i] = self._slow[i] + 1 if is_slow else 0
            if self._slow[i] == _IN_A_ROW:
                self._tell(i, step, more)


def find_stragglers(peers: Peers, log: EventLog) -> Stragglers:
    """Stragglers that are told to people and written to the events."""

    def tell(process: int, step: int, more: float) -> None:
        log.event("straggler", straggler=process, step=step, seconds_more=round(more, 4))
        slow = f"{peers.name(process)} is slow: {1000 * more:.0f} ms a step more than the others"
        print(f"step {step}: {slow}, on the host", flush=True)

    return Stragglers(peers, tell)
