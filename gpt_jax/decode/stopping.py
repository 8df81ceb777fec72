"""Stop strings in a text that comes in pieces."""


class StopStrings:
    """Passes text on until a stop string is complete; holds back what may be the start of one.

    What comes out does not depend on how the text was cut into pieces: it ends before the stop
    string that is complete first, and before the longest of those that are complete together.

    Attributes:
      found: Whether a stop string was complete.
    """

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""
        self.found = False

    def put(self, piece: str) -> str:
        """The text that cannot belong to a stop string any more."""
        assert not self.found
        text = self._held + piece
        matches = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := text.find(stop)) >= 0
        ]  # fmt: skip
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        passed = len(text) - self._num_held(text)
        self._held = text[passed:]
        return text[:passed]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
