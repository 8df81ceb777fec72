"""SIGTERM and Ctrl-C ask the loop to save and stop."""

import signal
from types import FrameType


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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
