"""POST /v1/completions: prompts in, texts out."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gpt_jax.decode.infill import infill_prompt
from gpt_jax.decode.request import Request, Token
from gpt_jax.serve import sampling
from gpt_jax.serve.choices import Choice, usage
from gpt_jax.serve.errors import bad_request
from gpt_jax.serve.generation import Generation, Prompted
from gpt_jax.serve.logprobs import Aligner, Placed, completion_logprobs, prompt_offsets
from gpt_jax.serve.schemas import CompletionRequest
from gpt_jax.serve.service import Service, new_id
from gpt_jax.serve.streaming import EventStream, answer

_DEFAULT_TOKENS = 16


class _Prompt(NamedTuple):
    """A prompt.

    Attributes:
      ids: What the model reads.
      num_before: How many of them stand before what was asked for.
      text, offsets: What is echoed, and where its tokens begin; empty without echo.
    """

    ids: tuple[int, ...]
    num_before: int
    text: str = ""
    offsets: Sequence[int] = ()


class _Work:
    """A request that is being answered."""

    def __init__(
        self, service: Service, body: CompletionRequest, name: str,
        prompts: Sequence[_Prompt], generation: Generation,
    ):  # fmt: skip
        self.service, self.body, self.generation, self.prompts = service, body, generation, prompts
        self.n = body.n or 1
        self.choices = [
            [Choice() for _ in range(request.params.n)] for request in generation.prompted.requests
        ]
        self.head = {
            "id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()),
            "model": name, "system_fingerprint": service.fingerprint,
        }  # fmt: skip

    def echo(self, prompt: int) -> tuple[str, list[Placed]]:
        """The text before a prompt's continuations, and its tokens; both empty without echo."""
        ids, num_before, text, offsets = self.prompts[prompt]
        placed = []
        scored = self.generation.jobs[prompt].prompt_tokens
        for i, offset in enumerate(offsets, num_before):
            token = scored[i] if scored is not None else None
            # Nothing stands before the first one of ids.
            placed.append(Placed(token or Token(ids[i], None), offset))
        if self.body.logprobs is not None:
            for choice in self.choices[prompt]:
                before = ids if self.generation.prompted.continues else ()
                choice.aligner = Aligner(self.service.opened.tokenizer, len(text), before)
        return text, placed

    def logprobs(self, placed: Sequence[Placed]) -> dict | None:
        """Of some tokens, if they were asked for."""
        top = self.body.logprobs
        return None if top is None else completion_logprobs(placed, top, self.service.texts)

    async def whole(self) -> dict:
        """The answer in one piece."""
        echoes: dict[int, tuple[str, list[Placed]]] = {}
        async for piece in self.generation.pieces():
            if piece.prompt not in echoes:
                echoes[piece.prompt] = self.echo(piece.prompt)
            self.choices[piece.prompt][piece.sample].put(piece)
        shown = []
        for prompt, samples in enumerate(self.choices):
            text, placed = echoes[prompt]
            # The best has the highest log-probability a token; the sort keeps ties in order.
            order = sorted(samples, key=lambda c: -c.logprob / max(c.num_tokens, 1))
            chosen = order if len(samples) > self.n else samples
            for choice in chosen[: self.n]:
                shown.append({
                    "index": len(shown), "text": text + choice.text,
                    "logprobs": self.logprobs(placed + choice.placed),
                    "finish_reason": choice.finish_reason,
                })  # fmt: skip
        return {**self.head, "choices": shown, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[dict]:
        """The answer piece by piece."""
        tells_usage = self.body.stream_options and self.body.stream_options.include_usage
        extra = {"usage": None} if tells_usage else {}

        def chunk(index: int, text: str, placed: Sequence[Placed], reason: str | None) -> dict:
            choice = {
                "index": index, "text": text, "logprobs": self.logprobs(placed),
                "finish_reason": reason,
            }  # fmt: skip
            return {**self.head, "choices": [choice], **extra}

        begun: set[int] = set()
        async for piece in self.generation.pieces():
            if piece.prompt not in begun:
                begun.add(piece.prompt)
                text, placed = self.echo(piece.prompt)
                for sample in range(self.n if text or placed else 0):
                    yield chunk(piece.prompt * self.n + sample, text, placed, None)
            placed = self.choices[piece.prompt][piece.sample].put(piece)
            if piece.text or placed or piece.finish_reason:
                index = piece.prompt * self.n + piece.sample
                yield chunk(index, piece.text, placed, piece.finish_reason)
        if tells_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict:
        """What clients call usage."""
        return usage(self.generation, [c for samples in self.choices for c in samples])


async def completions(request: HttpRequest, service: Service) -> Response:
    """The route."""
    service.check_writes()
    body = await service.read(request, CompletionRequest)
    name = service.check_model(body.model, request.path_params.get("engine"))
    _check(service, body)
    prompts, requests = await service.prepare(_requests, service, body)
    ends = sampling.end_ids(service, requests[0].params)
    streams = bool(body.stream)
    timeout = service.settings.request_timeout_s
    prompted = Prompted(requests, ends, streams, continues=not service.has_encoder)
    generation = await service.runner.submit(prompted, timeout)
    work = _Work(service, body, name, prompts, generation)
    if not streams:
        return await answer(request, work.whole())
    return EventStream(work.chunks(), generation)


def _check(service: Service, body: CompletionRequest) -> None:
    """Refuses fields that do not go together."""
    if body.suffix:
        _check_suffix(service, body)
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options", "is for streams only")
    n = body.n or 1
    if body.stream and body.best_of is not None and body.best_of > n:
        raise bad_request("best_of", "cannot be streamed: the best is known at the end")
    reads_whole = service.has_encoder or service.opened.model.config.read_prompts_whole
    if body.echo and body.logprobs is not None and reads_whole:
        raise bad_request("echo", "this model reads prompts whole; they have no log-probabilities")
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    count = len(body.prompt) if several else 1
    sampling.check_amounts(service, prompts=count, n=n, best_of=body.best_of)


def _check_suffix(service: Service, body: CompletionRequest) -> None:
    """A gap is filled between two texts."""
    if service.opened.infill is None:
        raise bad_request("suffix", "this model was not trained to fill in text before a suffix")
    texts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
    if not all(isinstance(text, str) for text in texts):
        raise bad_request("suffix", "needs a prompt of text")
    if body.echo:
        raise bad_request("echo", "cannot be given together with suffix")


def _requests(service: Service, body: CompletionRequest) -> tuple[list[_Prompt], list[Request]]:
    """Prompts, and what the engine gets."""
    asked = body.prompt if body.prompt is not None else ""
    several = isinstance(asked, list) and not isinstance(asked[0], int)
    all_asked = asked if several else [asked]
    if body.suffix:
        prompts = [_gap(service, prompt, body.suffix) for prompt in all_asked]
        ends = service.opened.infill.ends
    else:
        prompts = [_encode(service, prompt, bool(body.echo)) for prompt in all_asked]
        ends = ()
    make = sampling.constraint(service, body, ends)
    requests = []
    for prompt in prompts:
        size = len(prompt.ids)
        limit = sampling.token_limit(service, size, body.max_tokens, _DEFAULT_TOKENS, "max_tokens")
        params = sampling.sampling_params(
            service, body, max_tokens=limit, n=body.best_of or body.n or 1,
            top_logprobs=body.logprobs or 0, more_stop_ids=ends,
        )  # fmt: skip
        scored = bool(body.echo and body.logprobs is not None)
        requests.append(Request(prompt.ids, params, make, scored))
    return prompts, requests


def _gap(service: Service, before: str, behind: str) -> _Prompt:
    """What asks for the text between two others."""
    opened = service.opened
    ids = infill_prompt(
        opened.tokenizer, opened.infill, before, behind, before=opened.prefix_ids
    )  # fmt: skip
    return _Prompt(tuple(ids), 0)


def _encode(service: Service, asked: str | list[int], echo: bool) -> _Prompt:
    """A text is read behind the model's prefix; ids are read as they are."""
    opened = service.opened
    tokenizer = opened.tokenizer
    if isinstance(asked, str):
        suffix = opened.suffix_ids if service.has_encoder else ()
        # OpenAI's default prompt is the end-of-text token.
        ids = (*opened.prefix_ids, *tokenizer.encode(asked), *suffix) or (tokenizer.eos_id,)
        prompt = _Prompt(ids, len(opened.prefix_ids))
    else:
        size = tokenizer.vocab_size
        if unknown := [i for i in asked if i >= size]:
            raise bad_request("prompt", f"{unknown[0]} is not an id from 0 to {size - 1}")
        prompt = _Prompt(tuple(asked), 0)
    if not echo:
        return prompt
    text, offsets = prompt_offsets(tokenizer, asked)
    return prompt._replace(text=text, offsets=offsets)
