"""Messages into the prompt of a chat model."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gpt_jax.data import template_sandbox
from gpt_jax.data.chat import encode_prompt
from gpt_jax.data.chat_template import ChatTemplate
from gpt_jax.serve.errors import ApiError, bad_request, from_value_error
from gpt_jax.serve.message_schemas import Message, Tool
from gpt_jax.serve.service import Service

_Value = TypeVar("_Value")
_TRACED = ("<template>", template_sandbox.__file__)


def template_of(service: Service) -> ChatTemplate:
    """The model's template.

    Raises:
      ApiError: 400: it has none.
    """
    template = service.template
    if template is None:
        raise ApiError(
            400,
            f"The model {service.names[0]!r} has no chat template; use /v1/completions.",
            "model",
            "no_chat_template",
        )
    return template


def prompt_ids(
    service: Service, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[int, ...]:
    """What the model reads.

    Raises:
      ApiError: 400: the template refuses the messages or takes too long, or something spells a
        special token and would forge a turn.
    """
    tokenizer, template = service.chat_tokenizer, template_of(service)
    told = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    text = json.dumps(told, ensure_ascii=False)
    if forged := next((token for token in tokenizer.special_tokens if token in text), None):
        raise bad_request("tools", f"spells the special token {forged!r}")
    turns = [_turn(message) for message in messages]
    try:
        ids = _within(
            service.settings.template_timeout_s,
            lambda: encode_prompt(turns, tokenizer, template, tools=told),
        )
    except ValueError as error:
        raise from_value_error(error, {"tasks.template": "messages"}) from None
    if not ids:
        raise bad_request("messages", "the chat template makes nothing of them")
    return tuple(ids)


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content or "",
    }
    for field in ("name", "tool_call_id"):
        if (value := getattr(message, field)) is not None:
            turn[field] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _parsed(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; what is none stays text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _within(seconds: float, function: Callable[[], _Value]) -> _Value:
    """Calls a function that runs a template, and stops the template when its time is over.

    A thread cannot be ended from outside. So Python asks us at each line of a template's code, and
    of the sandbox, which stands around each call of a filter: one line may map a long list.
    """
    deadline = time.monotonic() + seconds

    def at_line(frame, event, argument):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it ran for more than {seconds:g} seconds")
        return at_line

    def at_call(frame, event, argument):
        return at_line if frame.f_code.co_filename in _TRACED else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        return function()
    finally:
        sys.settrace(before)
