"""POST /v1/embeddings: texts in, vectors out."""

import base64
import functools
import time

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gpt_jax.serve.errors import bad_request
from gpt_jax.serve.schemas import EmbeddingsRequest
from gpt_jax.serve.service import Service

# Tokens that are read between two steps of the running texts.
_TOKENS_AT_ONCE = 4096


async def embeddings(request: Request, service: Service) -> Response:
    """The route."""
    body = await service.read(request, EmbeddingsRequest)
    name = service.check_model(body.model, request.path_params.get("engine"))
    config = service.opened.model.config
    if config.family == "encoder_decoder":
        raise bad_request("model", f"{name!r} has an encoder and a decoder; it has no vectors")
    if body.dimensions not in (None, config.embed_dim):
        raise bad_request("dimensions", f"only {config.embed_dim}, the model's own, is available")
    if body.input is None:
        raise bad_request("input", "is required", "missing_required_parameter")
    several = isinstance(body.input, list) and not isinstance(body.input[0], int)
    inputs = body.input if several else [body.input]
    if len(inputs) > service.settings.max_prompts:
        most = service.settings.max_prompts
        raise bad_request("input", f"{len(inputs)} are above this server's limit of {most}")
    ids = await service.prepare(_ids, service, inputs)
    vectors = await _vectors(service, ids)
    as_base64 = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, as_base64)}
        for i, vector in enumerate(vectors)
    ]
    count = sum(map(len, ids))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _ids(service: Service, inputs: list) -> list[list[int]]:
    """What the model reads of each input."""
    from gpt_jax.evals.embed import input_ids

    size = service.opened.tokenizer.vocab_size
    found = []
    for number, value in enumerate(inputs):
        field = f"input[{number}]"
        if not isinstance(value, str) and (unknown := [i for i in value if i >= size]):
            raise bad_request(field, f"{unknown[0]} is not an id from 0 to {size - 1}")
        try:
            found += input_ids(service.opened, [value])
        except ValueError as error:
            reason = str(error).partition(": ")[2]
            code = "context_length_exceeded" if "context" in reason else "invalid_value"
            raise bad_request(field, reason, code) from None
        most = service.settings.max_input_tokens
        if most and len(found[-1]) > most:
            reason = f"{len(found[-1])} tokens are above this server's limit of {most}"
            raise bad_request(field, reason, "context_length_exceeded")
    return found


async def _vectors(service: Service, ids: list[list[int]]) -> np.ndarray:
    """f32[n, D], a few at a time, so that texts that are being generated go on in between."""
    from gpt_jax.evals.embed import embed

    # Powers of two, so that few sizes are compiled; and no more rows than there are texts.
    size = 1 << max(1, _TOKENS_AT_ONCE // max(map(len, ids))).bit_length() - 1
    deadline = time.monotonic() + service.settings.request_timeout_s
    found = []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        rows = 1 << (len(part) - 1).bit_length()
        work = functools.partial(embed, service.opened, part, batch_size=rows)
        found.append(await service.runner.call(work, max(0.0, deadline - time.monotonic())))
    return np.concatenate(found)


def _encoded(vector: np.ndarray, as_base64: bool) -> str | list[float]:
    """The floats, or their bytes, the least significant first."""
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
