"""One prompt's texts by any of the ways to write them: the engine, drafts, a beam search."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from gpt_jax.data.chat import encode_prompt
from gpt_jax.data.chat_template import CHATML, ChatTemplate, Messages
from gpt_jax.data.infill_tokens import InfillTokens
from gpt_jax.decode.constraints import (
    ConstraintFactory,
    grammar_constraint,
    json_schema_constraint,
    regex_constraint,
)
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.hf_generate import Writer, generate_rows
from gpt_jax.decode.hf_options import GenerateOptions
from gpt_jax.decode.infill import infill_prompt
from gpt_jax.decode.request import Request, Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.speculative import HasModel, speculate
from gpt_jax.decode.text import TextStream

# Texts that are decoded together at most, and tokens that a draft proposes.
MAX_SLOTS, NUM_DRAFT = 32, 4
# What a beam search takes of SamplingParams.
_OF_BEAMS = (
    "max_tokens", "min_tokens", "n", "seed", "temperature", "repetition_penalty",
    "no_repeat_ngram", "stop_ids", "ignore_eos",
)  # fmt: skip


class Prompted(Writer, Protocol):
    """What has words for a prompt: an OpenModel."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    infill: InfillTokens | None


@dataclasses.dataclass(frozen=True)
class Way:
    """How texts are written; by the engine unless something else is asked for.

    Attributes:
      beams: Above 1: a beam search; it draws nothing.
      draft: A model that proposes tokens.
      lookup: So many tokens are proposed from what stands in the text already; 0: none.
      constraint: What the text must be like (decode.constraints).

    Raises:
      ValueError: Two of them, or a number that is not allowed.
    """

    beams: int = 1
    draft: HasModel | None = None
    lookup: int = 0
    constraint: ConstraintFactory | None = None

    def __post_init__(self):
        for name, least in (("beams", 1), ("lookup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: {value!r} is not an integer of at least {least}")
        chosen = [field.name for field in dataclasses.fields(self)
                  if getattr(self, field.name) != field.default]  # fmt: skip
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]}: does not go together with {chosen[1]}")


class Written(NamedTuple):
    """What is new in one of the texts.

    Attributes:
      sample: Its number.
      text: What follows the piece before; whole characters.
      tokens: Its new tokens, some of whose text may still be held back; of a beam search none.
      finish_reason: None, or in a text's last piece "stop" or "length".
    """

    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None


class Whole(NamedTuple):
    """A text from its first piece to its last; attributes as of Written."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str


def write(
    target: Writer,
    ids: Sequence[int],
    params: SamplingParams,
    way: Way = Way(),
    *,
    streams: bool = False,
    continues: bool = False,
) -> Iterator[Written]:
    """Pieces of the params.n texts behind a prompt.

    Args:
      target: What writes.
      ids: The prompt; what an encoder_decoder's encoder reads.
      params: How to continue it.
      way: By which way.
      streams: Pieces come token by token, and not many tokens at a time.
      continues: The texts are shown behind the prompt's, and begin with the space between them.

    Raises:
      ValueError: The prompt or a value is not allowed; at the call.
    """
    before = ids if continues and target.model.config.family == "decoder" else ()
    if way.beams > 1:
        return iter(_by_beams(target, ids, params, way.beams, before))
    if way.draft is not None or way.lookup:
        return iter(_by_drafts(target, ids, params, way, before))
    if way.constraint is not None and params.ignore_eos:
        raise ValueError("ignore_eos: a text that is held to a form must end")
    engine = Engine(
        target.model, target.params, vocab_size=target.tokenizer.vocab_size,
        eos_ids=target.eos_ids, max_slots=min(params.n, MAX_SLOTS),
    )  # fmt: skip
    job = engine.submit(Request(tuple(ids), params, way.constraint))
    return _by_engine(engine, job, _texts(target, params, before), 1 if streams else None)


def constraint_of(
    target: Writer,
    *,
    json_schema: dict | str = "",
    regex: str = "",
    grammar: str = "",
    ends: tuple[int, ...] = (),
) -> ConstraintFactory | None:
    """What one of the three asks for; None where none does.

    Args:
      target: What writes.
      json_schema: A schema, or its JSON.
      regex, grammar: As in decode.constraints.
      ends: Ids that end a text beside the model's own.

    Raises:
      ValueError: Two do, or one cannot be compiled.
    """
    if isinstance(json_schema, str) and json_schema:
        try:
            json_schema = json.loads(json_schema)
        except ValueError as error:
            raise ValueError(f"json_schema: it is no JSON: {error}") from None
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    given = {name: value for name, value in given.items() if value != ""}
    if len(given) > 1:
        first, second = list(given)[:2]
        raise ValueError(f"{first}: does not go together with {second}")
    makers = {
        "json_schema": json_schema_constraint,
        "regex": regex_constraint,
        "grammar": grammar_constraint,
    }
    for name, value in given.items():
        return makers[name](target.tokenizer, value, eos_ids=(*target.eos_ids, *ends))
    return None


def prompt_of(
    target: Prompted, text: str, *, suffix: str = "", chat: bool = False, system: str = ""
) -> tuple[list[int], tuple[int, ...]]:
    """A prompt's ids, and what ends its continuation beside the model's own ids.

    Args:
      target: What continues it.
      text: The prompt; with `chat` a user's message.
      suffix: What comes behind the gap that is to be filled.
      chat: The chat template is put around the text.
      system: With `chat`: a message before it.

    Raises:
      ValueError: The model has no chat template, or was not trained to fill gaps.
    """
    tokenizer = target.tokenizer
    if suffix and chat:
        raise ValueError("suffix: does not go together with chat")
    if system and not chat:
        raise ValueError("system: goes with chat alone")
    if suffix:
        before = target.prefix_ids
        ids = infill_prompt(tokenizer, target.infill, text, suffix, before=before)
        return ids, target.infill.ends
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        return chat_prompt(target, [*messages, {"role": "user", "content": text}])
    ids = [*target.prefix_ids, *tokenizer.encode(text), *target.suffix_ids]
    # As OpenAI's default prompt is.
    return ids or [tokenizer.eos_id], ()


def chat_prompt(target: Prompted, messages: Messages) -> tuple[list[int], tuple[int, ...]]:
    """Ids up to where the assistant is to speak, and what ends its turn beside the model's ids.

    Raises:
      ValueError: The model has no chat template, or a message is none or spells a special token.
    """
    template = template_of(target)
    ids = encode_prompt(messages, target.tokenizer, template)
    return ids, template.turn_ends(target.tokenizer)


def template_of(target: Prompted) -> ChatTemplate:
    """The model's own chat template, or ChatML where its tokens are there.

    Raises:
      ValueError: Neither.
    """
    template = target.chat_template or (CHATML if CHATML.fits(target.tokenizer) else None)
    if template is None:
        raise ValueError("messages: this model has no chat template")
    return template


def whole(pieces: Iterator[Written], n: int) -> list[Whole]:
    """The n texts of their pieces."""
    texts, tokens, reasons = [""] * n, [()] * n, [""] * n
    for piece in pieces:
        texts[piece.sample] += piece.text
        tokens[piece.sample] += piece.tokens
        reasons[piece.sample] = piece.finish_reason
    return [Whole(*each) for each in zip(texts, tokens, reasons, strict=True)]


def _by_engine(engine, job, texts: list[TextStream], num_steps: int | None) -> Iterator[Written]:
    while any(text.finish_reason is None for text in texts):
        for _, output in engine.step(num_steps):
            stream = texts[output.sample]
            known = len(stream.tokens)
            new = stream.put(output.tokens, output.finish_reason)
            if stream.finish_reason and not output.finish_reason:
                engine.end(job, output.sample)
            yield Written(output.sample, new, tuple(stream.tokens[known:]), stream.finish_reason)


def _by_drafts(target, ids, params: SamplingParams, way: Way, before) -> list[Written]:
    (samples,) = speculate(
        target, way.draft, [ids], params, way.lookup or NUM_DRAFT, eos_ids=target.eos_ids,
        vocab_size=target.tokenizer.vocab_size,
    )  # fmt: skip
    pieces = []
    streams = _texts(target, params, before)
    for number, (sample, stream) in enumerate(zip(samples, streams, strict=True)):
        text = stream.put(sample.tokens, sample.finish_reason)
        pieces.append(Written(number, text, tuple(stream.tokens), stream.finish_reason))
    return pieces


def _by_beams(target, ids, params: SamplingParams, beams: int, before) -> list[Written]:
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name not in _OF_BEAMS and value != field.default:
            raise ValueError(f"{field.name}: {value!r} does not go together with beams")
    ends = params.ends(target.eos_ids)
    options = GenerateOptions(
        max_new_tokens=params.max_tokens, min_new_tokens=params.min_tokens, num_beams=beams,
        num_return_sequences=params.n, repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram, eos_token_id=ends or -1,
    )  # fmt: skip
    found = generate_rows(target, [ids], options, seed=0, make_engine=_no_engine)
    skipped = 1 if target.model.config.family == "encoder_decoder" else len(ids)
    pieces = []
    for number, row in enumerate(found.sequences):
        new = row[skipped:].tolist()
        end = next((i for i, token_id in enumerate(new) if token_id in ends), None)
        streamer = target.tokenizer.streamer(before)
        text = "".join(map(streamer.put, new[:end])) + streamer.flush()
        pieces.append(Written(number, text, (), "length" if end is None else "stop"))
    return pieces


def _no_engine(num_texts: int) -> Engine:
    raise AssertionError("a beam search needs none")


def _texts(target: Writer, params: SamplingParams, before: Sequence[int]) -> list[TextStream]:
    ends = params.ends(target.eos_ids)
    return [TextStream(target.tokenizer, params.stop, ends, before) for _ in range(params.n)]
