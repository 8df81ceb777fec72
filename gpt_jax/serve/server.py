"""A server on a port, which on SIGTERM finishes what it has begun."""

import asyncio
import contextlib
import copy
import logging
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from gpt_jax.serve.protocol import protocol_with
from gpt_jax.serve.settings import Settings

_LOG = logging.getLogger("gpt_jax.serve")
# Our own lines go where uvicorn's go.
_LOGGING = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
_LOGGING["loggers"]["gpt_jax.serve"] = {
    "handlers": ["default"], "level": "INFO", "propagate": False,
}  # fmt: skip
# Idle connections are closed after so many seconds.
_KEEP_ALIVE = 30


class Server(uvicorn.Server):
    """Drains: new requests get 503 while running ones go on, until they end or time is over."""

    def __init__(self, app: Starlette, settings: Settings):
        config = uvicorn.Config(
            app, host=settings.host, port=settings.port, log_level="info",
            timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 << 10, server_header=False, ws="none",
            http=protocol_with(settings.head_timeout_s), log_config=_LOGGING,
        )  # fmt: skip
        super().__init__(config)
        self._service, self._settings = app.state.service, settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal ends it."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once."""
        if self._service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        _LOG.info("draining: running requests have %g seconds", self._settings.drain_timeout_s)
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while self._service.in_flight:
                    await asyncio.sleep(0.05)
        # What is left over is told so.
        await asyncio.to_thread(self._service.runner.stop)
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """A socket at the settings' address.

    Raises:
      ValueError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        found.close()
        address = f"{settings.host}:{settings.port}"
        raise ValueError(f"port: cannot listen at {address}: {error}") from None
    found.listen(1024)
    return found
