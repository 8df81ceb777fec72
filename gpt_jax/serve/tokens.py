"""Text to ids and back, and what else clients ask of a tokenizer."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gpt_jax.serve.errors import bad_request
from gpt_jax.serve.schemas import DetokenizeRequest, TokenizeRequest
from gpt_jax.serve.service import Service


async def tokenize(request: Request, service: Service) -> Response:
    """Ids of a text, by default with those that the model reads around it.

    A special token is text like any other, unless it is all of the text: clients ask for the ids
    of the tokens that /tokenizer_info names.
    """
    body = await service.read(request, TokenizeRequest)
    if body.model is not None:
        service.check_model(body.model)
    opened = service.opened
    if body.prompt in opened.tokenizer.special_tokens:
        ids = [opened.tokenizer.token_id(body.prompt)]
    else:
        ids = await service.prepare(opened.tokenizer.encode, body.prompt)
    if body.add_special_tokens is not False:
        ids = [*opened.prefix_ids, *ids, *opened.suffix_ids]
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})


async def detokenize(request: Request, service: Service) -> Response:
    """The text of ids."""
    body = await service.read(request, DetokenizeRequest)
    if body.model is not None:
        service.check_model(body.model)
    tokenizer = service.opened.tokenizer
    if unknown := [i for i in body.tokens if i >= tokenizer.vocab_size]:
        raise bad_request(
            "tokens", f"{unknown[0]} is not an id from 0 to {tokenizer.vocab_size - 1}"
        )
    text = await service.prepare(tokenizer.decode, body.tokens, False)
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request, service: Service) -> Response:
    """Special tokens and the chat template."""
    opened, template = service.opened, service.template
    first = opened.prefix_ids[0] if opened.prefix_ids else None
    named = {} if template is None else dict(template.tokens)
    bos = opened.tokenizer.token_text(first) if first is not None else named.get("bos_token")
    return JSONResponse({
        "tokenizer_class": "gpt-jax",
        "vocab_size": opened.tokenizer.vocab_size,
        "bos_token": bos,
        "eos_token": opened.tokenizer.token_text(opened.eos_ids[0]),
        "pad_token": named.get("pad_token"),
        "unk_token": named.get("unk_token"),
        "chat_template": None if template is None else template.source,
        "max_model_len": service.context,
        "fingerprint": opened.tokenizer.fingerprint,
    })  # fmt: skip
