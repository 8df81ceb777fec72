"""Answers as server-sent events, and answers to clients that may go away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from gpt_jax.serve.errors import ApiError, internal
from gpt_jax.serve.generation import Generation

_LOG = logging.getLogger("gpt_jax.serve")
# Nginx's word for a client that went away; nobody reads it.
_CLIENT_GONE = 499


class EventStream(StreamingResponse):
    """Chunks as they come, then [DONE]; a failure on the way is an event too."""

    def __init__(self, chunks: AsyncIterator[dict], generation: Generation):
        """
        Args:
          chunks: What to send.
          generation: Cancelled when the client goes away.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks), media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _events(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.body)
    except Exception:
        _LOG.exception("a stream failed")
        yield _event(internal().body)
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"


async def answer(request: HttpRequest, work: Coroutine[Any, Any, dict]) -> Response:
    """An answer in one piece; the work is cancelled when the client goes away."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return JSONResponse(working.result())
        return Response(status_code=_CLIENT_GONE)
    finally:
        gone.cancel()
        working.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
