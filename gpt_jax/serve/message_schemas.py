"""The parts of a conversation: messages, tools, the form of the answer."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_SCHEMA_BYTES = 1 << 16
_NAME = r"^[A-Za-z0-9_-]{1,64}$"


def _text(value: Any) -> str | None:
    """Parts of text become one text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("not a string or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise ValueError(
                f"{str(kind)[:50]!r} is not 'text', the only kind of part that is read"
            )
        text = part.get(kind)
        if not isinstance(text, str) or set(part) - {"type", kind}:
            raise ValueError(f"a part of kind {kind!r} must have {kind!r}, a string, and no more")
        texts.append(text)
    return "".join(texts)


def _schema(value: Any) -> dict[str, Any] | bool | None:
    if not (value is None or isinstance(value, dict | bool)):
        raise ValueError("not a JSON schema")
    if len(json.dumps(value)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"longer than {MAX_SCHEMA_BYTES} bytes")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CalledFunction(_Part):
    """What a call of a tool says; the arguments are JSON in a string."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: str


class ToolCall(_Part):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(_Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_text)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Clients send back what they got.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self):
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role!r} must have content")
        return self


class Function(_Part):
    """A function that the assistant may call."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: Annotated[Any, AfterValidator(_schema)] = None
    strict: bool | None = None


class Tool(_Part):
    """A tool."""

    type: Literal["function"]
    function: Function


class JsonSchema(_Part):
    """A schema that the answer must fit."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    strict: bool | None = None
    # `schema` is a method of pydantic's models.
    schema_: Annotated[Any, AfterValidator(_schema), Field(alias="schema")] = None


class ResponseFormat(_Part):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with the type 'json_schema', and only then")
        return self


def checked_tool_choice(value: Any) -> str | dict[str, Any] | None:
    """ "none", "auto", "required", or which function."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and set(value) == {"type", "function"}:
        function = value["function"]
        named = isinstance(function, dict) and set(function) == {"name"}
        if value["type"] == "function" and named and isinstance(function["name"], str):
            return value
    raise ValueError(
        "not 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
    )
