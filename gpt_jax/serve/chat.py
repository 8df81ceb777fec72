"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gpt_jax.decode.request import Constraint, Request
from gpt_jax.serve import chat_prompt, sampling
from gpt_jax.serve.choices import Choice, usage
from gpt_jax.serve.errors import bad_request
from gpt_jax.serve.generation import Generation, Prompted
from gpt_jax.serve.logprobs import Aligner, Placed, chat_logprobs
from gpt_jax.serve.message_schemas import Function
from gpt_jax.serve.schemas import ChatRequest
from gpt_jax.serve.service import Service, new_id
from gpt_jax.serve.streaming import EventStream, answer
from gpt_jax.serve.tool_calls import Call, CallReader, forced_grammar, takes_tools


class _Work:
    """A conversation that is being answered."""

    def __init__(self, service: Service, body: ChatRequest, name: str, generation: Generation):
        self.service, self.body, self.generation = service, body, generation
        tokenizer = service.opened.tokenizer
        number = generation.prompted.requests[0].params.n
        self.choices = [Choice() for _ in range(number)]
        if body.logprobs:
            for choice in self.choices:
                choice.aligner = Aligner(tokenizer)
        self.readers: list[CallReader | None] = [None] * number
        if functions := _callable(body):
            most = 1 if body.parallel_tool_calls is False else None
            names = [function.name for function in functions]
            self.readers = [CallReader(names, most) for _ in self.choices]
        self.head = {
            "id": new_id("chatcmpl"), "created": int(time.time()), "model": name,
            "system_fingerprint": service.fingerprint,
        }  # fmt: skip

    def logprobs(self, placed: Sequence[Placed]) -> dict | None:
        """Of some tokens, if they were asked for."""
        if not self.body.logprobs:
            return None
        return chat_logprobs(placed, self.body.top_logprobs or 0, self.service.texts)

    def read(self, sample: int, text: str, last: bool) -> tuple[str, list[Call]]:
        """A piece's text without calls of tools, and those."""
        reader = self.readers[sample]
        return (text, []) if reader is None else reader.put(text, last)

    def reason(self, sample: int, reason: str) -> str:
        """Why a choice ended; a call of a tool is a reason of its own."""
        reader = self.readers[sample]
        return "tool_calls" if reader and reader.num_calls and reason == "stop" else reason

    async def whole(self) -> dict:
        """The answer in one piece."""
        texts: list[str] = [""] * len(self.choices)
        calls: list[list[Call]] = [[] for _ in self.choices]
        async for piece in self.generation.pieces():
            self.choices[piece.sample].put(piece)
            text, called = self.read(piece.sample, piece.text, piece.finish_reason is not None)
            texts[piece.sample] += text
            calls[piece.sample] += called
        shown = []
        for i, choice in enumerate(self.choices):
            content = None if calls[i] and not texts[i].strip() else texts[i]
            message = {"role": "assistant", "content": content, "refusal": None}
            if calls[i]:
                message["tool_calls"] = [_call(call) for call in calls[i]]
            shown.append({
                "index": i, "message": message, "logprobs": self.logprobs(choice.placed),
                "finish_reason": self.reason(i, choice.finish_reason),
            })  # fmt: skip
        head = {**self.head, "object": "chat.completion"}
        return {**head, "choices": shown, "usage": usage(self.generation, self.choices)}

    async def chunks(self) -> AsyncIterator[dict]:
        """The answer piece by piece: roles, then text and calls, then reasons."""
        tells_usage = self.body.stream_options and self.body.stream_options.include_usage
        head = {**self.head, "object": "chat.completion.chunk"}
        extra = {"usage": None} if tells_usage else {}

        def chunk(index: int, delta: dict, logprobs=None, reason: str | None = None) -> dict:
            choice = {
                "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason,
            }  # fmt: skip
            return {**head, "choices": [choice], **extra}

        for i in range(len(self.choices)):
            yield chunk(i, {"role": "assistant", "content": "", "refusal": None})
        async for piece in self.generation.pieces():
            i, ended = piece.sample, piece.finish_reason is not None
            placed = self.choices[i].put(piece)
            text, calls = self.read(i, piece.text, ended)
            if text or placed:
                yield chunk(i, {"content": text}, self.logprobs(placed))
            for number, call in enumerate(calls, self.num_calls(i) - len(calls)):
                yield chunk(i, {"tool_calls": [{"index": number, **_call(call)}]})
            if ended:
                yield chunk(i, {}, None, self.reason(i, piece.finish_reason))
        if tells_usage:
            yield {**head, "choices": [], "usage": usage(self.generation, self.choices)}

    def num_calls(self, sample: int) -> int:
        """Calls so far."""
        reader = self.readers[sample]
        return reader.num_calls if reader else 0


def _call(call: Call) -> dict:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_id("call"), "type": "function", "function": function}


async def chat(request: HttpRequest, service: Service) -> Response:
    """The route."""
    service.check_writes()
    body = await service.read(request, ChatRequest)
    name = service.check_model(body.model)
    _check(service, body)
    asked = await service.prepare(_request, service, body)
    ends = sampling.end_ids(service, asked.params)
    timeout = service.settings.request_timeout_s
    generation = await service.runner.submit(Prompted([asked], ends, bool(body.stream)), timeout)
    work = _Work(service, body, name, generation)
    if not body.stream:
        return await answer(request, work.whole())
    return EventStream(work.chunks(), generation)


def _check(service: Service, body: ChatRequest) -> None:
    """Refuses fields that do not go together."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options", "is for streams only")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs", "needs logprobs true")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise bad_request("max_tokens", "cannot be given together with max_completion_tokens")
    if body.max_tokens == 0:
        raise bad_request("max_tokens", "0 is not at least 1")
    if not body.tools and body.tool_choice not in (None, "none"):
        raise bad_request("tool_choice", "needs tools")
    if body.tools:
        template = chat_prompt.template_of(service)
        if not takes_tools(template, service.opened.tokenizer):
            raise bad_request("tools", "this model's chat template has no tools")
        names = [tool.function.name for tool in body.tools]
        if len(set(names)) < len(names):
            raise bad_request("tools", "two functions have the same name")
        if isinstance(body.tool_choice, dict):
            chosen = body.tool_choice["function"]["name"]
            if chosen not in names:
                raise bad_request("tool_choice", f"{chosen[:64]!r} is none of the tools")
    sampling.check_amounts(service, prompts=1, n=body.n or 1, best_of=None)


def _request(service: Service, body: ChatRequest) -> Request:
    """What the engine gets."""
    tools = None if body.tool_choice == "none" else body.tools
    ids = chat_prompt.prompt_ids(service, body.messages, tools)
    field = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    asked = getattr(body, field)
    limit = sampling.token_limit(service, len(ids), asked, None, field, "messages")
    params = sampling.sampling_params(
        service, body, max_tokens=limit, n=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
        more_stop_ids=_turn_ends(service),
    )  # fmt: skip
    return Request(ids, params, _constraint(service, body))


def _constraint(service: Service, body: ChatRequest) -> Callable[[], Constraint] | None:
    """What the answer must be like: a form, or a call of a tool."""
    ends = _turn_ends(service)
    make = sampling.constraint(service, body, ends)
    if body.tool_choice in (None, "none", "auto"):
        return make
    if make is not None:
        raise bad_request("tool_choice", "a call and a form of the answer cannot both be forced")
    grammar = forced_grammar(_callable(body))
    return sampling.compiled(service, "tool_choice", grammar, ends, bool(body.ignore_eos))


def _turn_ends(service: Service) -> tuple[int, ...]:
    return chat_prompt.template_of(service).turn_ends(service.opened.tokenizer)


def _callable(body: ChatRequest) -> list[Function]:
    """The functions that this answer may call."""
    if not body.tools or body.tool_choice == "none":
        return []
    functions = [tool.function for tool in body.tools]
    if isinstance(body.tool_choice, dict):
        chosen = body.tool_choice["function"]["name"]
        functions = [function for function in functions if function.name == chosen]
    return functions
