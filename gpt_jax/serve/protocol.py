"""HTTP as uvicorn speaks it, with a limit of how long a request's head may take."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with(head_timeout: float) -> type[H11Protocol]:
    """A protocol that closes connections whose next request does not come on.

    Args:
      head_timeout: Seconds from the connection, or from a request's first byte, to its last line.
    """

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._watch()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout, self.transport.close)

        def _rest(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Protocol
