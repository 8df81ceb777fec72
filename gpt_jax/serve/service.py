"""What every route needs: the model, its limits, and how bodies are read."""

import asyncio
import concurrent.futures
import copy
import hashlib
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic
from starlette.requests import Request as HttpRequest

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.serve.errors import ApiError, bad_request, model_not_found
from gpt_jax.serve.json_body import parse_json
from gpt_jax.serve.metrics import Metrics
from gpt_jax.serve.runner import Runner
from gpt_jax.serve.schemas import validated
from gpt_jax.serve.settings import Settings
from gpt_jax.serve.token_text import TokenTexts

_Schema = TypeVar("_Schema", bound=pydantic.BaseModel)


class Service:
    """A model that is served.

    Attributes:
      opened: The model.
      settings: Limits.
      runner: The engine's thread.
      metrics: Numbers.
      texts: How tokens are written.
      chat_tokenizer: Encodes what a template wrote; a copy, since it must see special tokens in a
        text while other threads must not.
      names: Names under which clients may ask for the model, its own first.
      created: When it was opened, in seconds of Unix.
      fingerprint: Changes with the model's shape and tokenizer.
      draining: No new work is taken.
      in_flight: Requests in work.
    """

    def __init__(self, opened: OpenModel, settings: Settings, runner: Runner, metrics: Metrics):
        self.opened, self.settings, self.runner, self.metrics = opened, settings, runner, metrics
        self.texts = TokenTexts(opened.tokenizer)
        self.chat_tokenizer = copy.deepcopy(opened.tokenizer)
        self.names = (opened.name, *settings.aliases)
        self.created = int(time.time())
        shape = f"{opened.tokenizer.fingerprint}{opened.model.config!r}"
        self.fingerprint = f"fp_{hashlib.sha256(shape.encode()).hexdigest()[:12]}"
        self.draining = False
        self.in_flight = 0
        # One thread: work of many requests takes turns, as it would on the interpreter's lock.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "prepare")

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        return self.opened.model.config.seq_len

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are read by an encoder, and have a context of their own."""
        return self.opened.model.config.family == "encoder_decoder"

    @property
    def writes_text(self) -> bool:
        """Whether the model can continue a text."""
        return writes_text(self.opened)

    @property
    def template(self) -> ChatTemplate | None:
        """How messages become a prompt; None where the model has no way."""
        if self.opened.chat_template is not None:
            return self.opened.chat_template
        return CHATML if CHATML.fits(self.opened.tokenizer) else None

    async def read(self, request: HttpRequest, schema: type[_Schema]) -> _Schema:
        """A request's body.

        Raises:
          ApiError: 400, 408 or 413.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise bad_request(None, "The header Content-Type must be 'application/json'.")
        body = await self._body(request)
        value = parse_json(body) if len(body) < 1 << 16 else await self.prepare(parse_json, body)
        return validated(schema, value)

    async def prepare(self, function: Callable, *arguments: Any) -> Any:
        """Work that would hold up the event loop; one piece of it at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    def check_model(self, name: str | None, engine: str | None = None) -> str:
        """The name that the answer bears.

        Args:
          name: In the body.
          engine: In the path; then the body needs none.

        Raises:
          ApiError: 400 or 404.
        """
        if engine is not None and name not in (None, engine):
            raise bad_request("model", f"{name[:200]!r} is not the engine of the path")
        name = engine if name is None else name
        if name is None:
            raise bad_request("model", "is required", "missing_required_parameter")
        if name not in self.names:
            raise model_not_found(name)
        return name

    def check_writes(self) -> None:
        """Raises ApiError where the model writes no text."""
        if not self.writes_text:
            raise bad_request("model", f"{self.names[0]!r} gives embeddings; it writes no text")

    def close(self) -> None:
        """Ends the threads."""
        self.runner.stop()
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _body(self, request: HttpRequest) -> bytes:
        most = self.settings.max_body_bytes
        too_long = ApiError(413, f"The body is longer than {most} bytes.", code="body_too_long")
        length = request.headers.get("content-length", "0")
        # An int of a long string of digits costs time; so long a body is too long anyhow.
        if len(length) > 15 or (length.isdigit() and int(length) > most):
            raise too_long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_long
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "The body took too long to arrive.", code="timeout") from None
        return b"".join(parts)


def writes_text(opened: OpenModel) -> bool:
    """Whether a model can continue a text."""
    config = opened.model.config
    return config.head == "lm" and config.family != "encoder"


def new_id(prefix: str) -> str:
    """A name that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"
