"""What stands before every route: an id, keys, limits of how much is in work."""

import asyncio
import logging
import uuid

from starlette.types import ASGIApp, Receive, Scope, Send

from gpt_jax.serve.auth import Keys
from gpt_jax.serve.errors import ApiError, too_many
from gpt_jax.serve.service import Service

_LOG = logging.getLogger("gpt_jax.serve")
# What is answered however much is to do.
_ALWAYS = ("/", "/health", "/metrics")


class Gate:
    """Lets requests in, or answers in their place."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys):
        self._app, self._service, self._keys = app, service, keys
        settings = service.settings
        self._limit = settings.body_timeout_s + 2 * settings.request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"

        async def tagged(message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.responded(message["status"])
                own = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), own]}
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, tagged)
            return
        self._service.in_flight += 1
        try:
            # Everything has a limit of its own but a client that reads too slowly.
            async with asyncio.timeout(self._limit):
                await self._app(scope, receive, tagged)
        except TimeoutError:
            _LOG.info("%s: the client was too slow", request_id)
        finally:
            self._service.in_flight -= 1

    def _check(self, scope: Scope) -> None:
        path, service = scope["path"], self._service
        authorization = dict(scope["headers"]).get(b"authorization")
        self._keys.check(path, authorization)
        if path in _ALWAYS:
            return
        if service.draining:
            raise ApiError(
                503, "The server is shutting down.", code="shutting_down",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        if service.in_flight >= service.settings.max_requests:
            raise too_many("The server has too many requests in work; try again later.")
