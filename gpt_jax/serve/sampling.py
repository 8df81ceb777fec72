"""From a request's body to what the engine is asked for."""

import secrets
from collections.abc import Callable

from gpt_jax.decode.request import Constraint
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.serve.errors import bad_request, from_value_error
from gpt_jax.serve.schemas import Sampling
from gpt_jax.serve.service import Service

# Our name of a field -> a request's.
_NAMES = {"stop_ids": "stop_token_ids", "top_logprobs": "logprobs"}
# OpenAI allows 0, which leaves only the most likely token; so does this.
_LEAST_TOP_P = 1e-9


def token_limit(
    service: Service,
    size: int,
    asked: int | None,
    default: int | None,
    field: str,
    prompt_field: str = "prompt",
) -> int:
    """How many tokens may be generated behind a prompt.

    Args:
      service: The model.
      size: Tokens of the prompt.
      asked: What the request says.
      default: What holds where it says nothing; None: all that the context has.
      field, prompt_field: The request's fields of `asked` and of the prompt.

    Raises:
      ApiError: 400: more than the server or the context allows; a prompt is never cut.
    """
    context, most = service.context, service.settings.max_tokens
    if most and asked is not None and asked > most:
        raise bad_request(field, f"{asked} is above this server's limit of {most}")
    left = context if service.has_encoder else context - size
    needed = asked if asked is not None else 1
    if needed > left or size > context:
        total = needed if service.has_encoder else size + needed
        raise bad_request(
            prompt_field,
            f"this model's maximum context length is {context} tokens, but {total} were asked "
            f"for: {size} in the prompt and {needed} to be written",
            "context_length_exceeded",
        )
    if asked is not None:
        return asked
    return min(left, most or left, default or left)


def sampling_params(
    service: Service, body: Sampling, *, max_tokens: int, n: int, top_logprobs: int,
    more_stop_ids: tuple[int, ...] = (),
) -> SamplingParams:  # fmt: skip
    """A request's rules.

    Args:
      service: The model.
      body: The request.
      max_tokens, n, top_logprobs: What routes have different fields for.
      more_stop_ids: Ids that end a text beside the request's, unless it ignores the model's own.

    Raises:
      ApiError: 400.
    """
    vocab_size = service.opened.tokenizer.vocab_size
    for field, ids in (
        ("logit_bias", [token_id for token_id, _ in body.logit_bias]),
        ("stop_token_ids", body.stop_token_ids),
    ):
        if unknown := [i for i in ids if i >= vocab_size]:
            raise bad_request(field, f"{unknown[0]} is not an id from 0 to {vocab_size - 1}")
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else max(float(body.top_p), _LEAST_TOP_P),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias,
            no_repeat_ngram=body.no_repeat_ngram or 0,
            n=n,
            stop=body.stop,
            stop_ids=body.stop_token_ids + (() if body.ignore_eos else more_stop_ids),
            ignore_eos=bool(body.ignore_eos),
            top_logprobs=top_logprobs,
            seed=seed,
        )
    except ValueError as error:
        raise from_value_error(error, _NAMES) from None


def end_ids(service: Service, params: SamplingParams) -> tuple[int, ...]:
    """Ids that end a text and are no part of it."""
    return params.ends(service.opened.eos_ids)


def check_amounts(service: Service, *, prompts: int, n: int, best_of: int | None) -> None:
    """Refuses a request that would be too much work before any of it is done.

    Raises:
      ApiError: 400.
    """
    settings = service.settings
    for field, value, most in (
        ("n", n, settings.max_n),
        ("best_of", best_of or n, settings.max_n),
        ("prompt", prompts, settings.max_prompts),
    ):
        if value > most:
            raise bad_request(field, f"{value} is above this server's limit of {most}")
    if best_of is not None and best_of < n:
        raise bad_request("best_of", f"{best_of} is below n {n}")
    total = prompts * max(n, best_of or n)
    if total > settings.max_choices:
        raise bad_request(
            "n", f"{total} texts in all are above this server's limit of {settings.max_choices}"
        )


def constraint(
    service: Service, body: Sampling, more_stop_ids: tuple[int, ...] = ()
) -> Callable[[], Constraint] | None:
    """What the text must be like; takes time.

    Args:
      service: The model.
      body: The request.
      more_stop_ids: Ids that end a text beside the model's own.

    Raises:
      ApiError: 400: two at once, or one that cannot be compiled.
    """
    form = body.response_format
    asked = {
        "response_format": form if form is not None and form.type != "text" else None,
        "guided_regex": body.guided_regex,
        "guided_grammar": body.guided_grammar,
    }
    given = [field for field, value in asked.items() if value is not None]
    if len(given) > 1:
        raise bad_request(given[1], f"cannot be given together with {given[0]}")
    if not given:
        return None
    field, value = given[0], asked[given[0]]
    if field == "response_format":
        schema = form.json_schema.schema_ if form.json_schema is not None else None
        value = {"type": "object"} if schema is None else schema
    return compiled(service, field, value, more_stop_ids, bool(body.ignore_eos))


def compiled(
    service: Service, field: str, value, more_stop_ids: tuple[int, ...], ignores_eos: bool
) -> Callable[[], Constraint]:
    """A constraint by the field that asks for it.

    Raises:
      ApiError: 400.
    """
    from gpt_jax.decode import constraints

    if ignores_eos:
        raise bad_request("ignore_eos", f"cannot be given together with {field}")
    makers = {
        "response_format": constraints.json_schema_constraint,
        "guided_regex": constraints.regex_constraint,
        "guided_grammar": constraints.grammar_constraint,
        "tool_choice": constraints.grammar_constraint,
    }
    opened = service.opened
    try:
        return makers[field](opened.tokenizer, value, eos_ids=(*opened.eos_ids, *more_stop_ids))
    except ValueError as error:
        # The name of the field there is another or has more parts.
        raise bad_request(field, " ".join(str(error).split()).partition(": ")[2]) from None
