"""Bodies of requests: every field of OpenAI's, what it may be, and what this server adds.

Fields that are not here are refused by name. docs/server.md tells what each one does.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gpt_jax.serve.errors import bad_request
from gpt_jax.serve.message_schemas import (
    Message,
    ResponseFormat,
    Tool,
    checked_tool_choice,
)

MAX_STOPS = 4
MAX_STOP_CHARS = 256  # finding a stop string costs time that grows with its length
MAX_BIASES = 1024
MAX_IDS = 64
MAX_MESSAGES = 1024
MAX_TOOLS = 128
MAX_PATTERN_CHARS = 8192


def _prompts(value: Any) -> Any:
    """A text, ids, or a list of one kind of them."""

    def is_ids(items) -> bool:
        return bool(items) and all(type(i) is int and 0 <= i < 2**31 for i in items)

    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or is_ids(value):
            return value
        if all(isinstance(item, list) and is_ids(item) for item in value):
            return value
    raise ValueError("not a string, a list of strings, a list of ids or a list of lists of ids")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
    if not right or len(stops) > MAX_STOPS:
        raise ValueError(f"not a non-empty string or a list of at most {MAX_STOPS} of them")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"a stop string is longer than {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"not an object of at most {MAX_BIASES} ids and biases")
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) < 10):
            raise ValueError(f"{token_id[:50]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {token_id} is not a number from -100 to 100")
    pairs = {int(token_id): float(bias) for token_id, bias in value.items()}
    return tuple(pairs.items())


def _ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value
    right = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not right or len(ids) > MAX_IDS:
        raise ValueError(f"not a list of at most {MAX_IDS} ids")
    return tuple(ids)


def _refused(reason: str):
    def check(value: Any) -> None:
        if value is not None:
            raise ValueError(reason)

    return Annotated[Any, AfterValidator(check)]


def _only(allowed: Any, reason: str):
    def check(value: Any) -> None:
        if value is not None and value != allowed:
            raise ValueError(reason)

    return Annotated[Any, AfterValidator(check)]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Harmless: for the books of a larger service.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(BaseModel):
    """What a stream also tells."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: _only(False, "not available; only false is") = None


class Sampling(Body):
    """How a text is to be continued."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[Any, AfterValidator(_biases)] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[Any, AfterValidator(_ids)] = ()
    guided_regex: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = None
    guided_grammar: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_prompts)] = None
    best_of: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, AfterValidator(checked_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    modalities: _only(["text"], "this server writes text only") = None
    audio: _refused("this server writes text only") = None
    functions: _refused("give tools instead") = None
    function_call: _refused("give tool_choice instead") = None
    moderation: _refused("this server does not moderate") = None
    prediction: _refused("not available") = None
    reasoning_effort: _refused("this server's models have no such setting") = None
    verbosity: _refused("this server's models have no such setting") = None
    web_search_options: _refused("this server searches nothing") = None


class EmbeddingsRequest(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Annotated[Any, AfterValidator(_prompts)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


_Model = TypeVar("_Model", bound=BaseModel)


def validated(schema: type[_Model], value: dict[str, Any]) -> _Model:
    """A body as its schema has it.

    Raises:
      ApiError: 400, about the first field that is wrong.
    """
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}"
    param = param.lstrip(".")[:200]
    if first["type"] == "extra_forbidden":
        raise bad_request(param, "this server does not know this field", "unknown_parameter")
    if first["type"] == "missing":
        raise bad_request(param, "is required", "missing_required_parameter")
    raise bad_request(param, first["msg"].removeprefix("Value error, "), "invalid_value")
