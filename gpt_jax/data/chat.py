"""Conversations and preference pairs as records: tokens, and which of them the loss counts.

A record is one example, unpadded: tokens, targets, positions, segment_ids (from 1) int32[T] and
loss_mask float32[T].  Records may be put behind each other in a row: attention stays in a segment.
"""

import bisect
import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np

from gpt_jax.data.chat_template import ChatTemplate, Messages
from gpt_jax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

Record = dict[str, np.ndarray]
_Half = tuple[np.ndarray, np.ndarray]  # ids int32[n], and whether each is to be learned bool[n]


def encode_chat(
    messages: Messages, tokenizer: Tokenizer, template: ChatTemplate, seq_len: int, where: str = ""
) -> Record | None:
    """One conversation, with loss on the assistant's turns and the tokens that end them.

    Nothing is put before the template's text: a prompt at inference is that text too.  What
    comes behind the last turn of the assistant is left out.  A conversation that is too long loses
    its first turns: it then begins with its system message and a later turn of the user.

    Args:
      messages: dicts with `role` and `content`, the assistant's last.
      tokenizer: encodes the text; its special tokens are recognised in what the template writes.
      template: turns messages into text.
      seq_len: most tokens (T) that the record may have.
      where: what errors begin with: the config's field, file and row.

    Returns:
      The record, or None: the last exchange alone is longer than seq_len.

    Raises:
      ValueError: the messages are not well-formed, one of them spells a special token and so would
        forge a turn, or the template fails.
    """
    template = _named(template, tokenizer, where)
    check_messages(messages, tokenizer, where)
    cuts, turns_from = _cuts(messages)

    @functools.cache
    def encoded(cut: int) -> _Half:
        return _encode_turns(turns_from(cut), tokenizer, template)

    cut = _first_that_fits(cuts, lambda cut: len(encoded(cut)[0]) - 1 <= seq_len)
    return None if cut is None else _record([encoded(cut)])


def encode_preference(
    row: dict, tokenizer: Tokenizer, template: ChatTemplate | None, seq_len: int, where: str = ""
) -> Record | None:
    """A prompt with a better and a worse answer, as two segments of one record.

    Segment 1 is prompt and chosen answer, segment 2 prompt and rejected answer; the loss counts the
    answers and the tokens that end them.  Each has at most seq_len // 2 tokens.  Of a prompt that
    is too long the beginning is left out, of both segments alike: tokens of a text, whole turns of
    messages.  An answer is never cut.

    Args:
      row: `prompt` (text or messages), `chosen` and `rejected` (text, a message or messages).
      template: None takes the texts as they are, between two end-of-text tokens; with a template
        a text is a message of the user's (prompt) or the assistant's (answers).
      tokenizer, seq_len, where: as in `encode_chat`.

    Returns:
      The record, or None: an answer, with the last turn before it, is too long.

    Raises:
      ValueError: as `encode_chat`; a field is missing; messages are given without a template.
    """
    for field in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(field), str if template is None else (str, dict, list)):
            kind = "text" if template is None else "text or messages"
            raise _wrong(where, field, f"{_kind(row.get(field))} where {kind} should be")
    if template is None:
        halves = _text_halves(row, tokenizer, seq_len // 2)
    else:
        template = _named(template, tokenizer, where)
        halves = _chat_halves(row, tokenizer, template, seq_len // 2, where)
    return None if halves is None else _record(halves)


def encode_prompt(
    messages: Messages, tokenizer: Tokenizer, template: ChatTemplate, where: str = "", **extras
) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak; see `encode_chat`."""
    template = _named(template, tokenizer, where)
    check_messages(messages, tokenizer, where, complete=False)
    text = template.render(messages, add_generation_prompt=True, **extras)
    return tokenizer.encode_with_offsets(text, parse_special=True)[0]


def check_messages(
    messages, tokenizer: Tokenizer, where: str = "", field: str = "messages", complete: bool = True
) -> None:
    """Refuses what is no conversation, or would not come out of the template as it went in.

    Only special tokens are looked for: where a template's borders are ordinary text ("[INST]"), a
    message may quote them.

    Args:
      messages: what a row holds.
      where: as in `encode_chat`.
      field: its name in the row.
      complete: the last message must be the assistant's.

    Raises:
      ValueError: names file, row and field.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong(where, field, f"{_kind(messages)} where a list of messages should be")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(where, f"{field}[{i}]", f"{_kind(message)}, not role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _wrong(where, f"{field}[{i}].role", f"{role!r} is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _wrong(where, f"{field}[{i}].content", f"{_kind(content)}, not text")
        for key, value in message.items():
            _check_text(value, tokenizer, where, f"{field}[{i}].{key}")
    if complete and messages[-1]["role"] != "assistant":
        name = f"{field}[{len(messages) - 1}].role"
        raise _wrong(where, name, f"{messages[-1]['role']!r}, but the assistant must come last")


def _check_text(value, tokenizer: Tokenizer, where: str, field: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    forged = next((token for token in tokenizer.special_tokens if token in text), None)
    if forged is not None:
        raise _wrong(where, field, f"holds the special token {forged!r}, which would forge a turn")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(where, field, f"character {error.start} is half of a surrogate pair") from None


def _named(template: ChatTemplate, tokenizer: Tokenizer, where: str) -> ChatTemplate:
    """The template, whose errors also name the row; its special tokens must exist."""
    missing = [token for token in template.required if token not in tokenizer.special_tokens]
    if missing:
        raise ValueError(
            f"data.special_tokens: {template.name} needs {', '.join(missing)}, which the tokenizer "
            "lacks"
        )
    return dataclasses.replace(template, name=f"{template.name}: {where}") if where else template


def _chat_halves(row, tokenizer, template, limit: int, where: str) -> list[_Half] | None:
    prompt = _as_messages(row["prompt"], "user")
    check_messages(prompt, tokenizer, where, "prompt", complete=False)
    answers = []
    for field in ("chosen", "rejected"):
        answers.append(_as_messages(row[field], "assistant"))
        check_messages(answers[-1], tokenizer, where, field)
    cuts, turns_from = _cuts(prompt)

    @functools.cache
    def encoded(cut: int) -> list[_Half]:
        turns = turns_from(cut)
        num_earlier = len(template.render_with_spans(turns)[1])
        return [
            _encode_turns([*turns, *answer], tokenizer, template, num_earlier) for answer in answers
        ]

    cut = _first_that_fits(cuts, lambda cut: max(len(ids) for ids, _ in encoded(cut)) - 1 <= limit)
    return None if cut is None else encoded(cut)


def _text_halves(row, tokenizer: Tokenizer, limit: int) -> list[_Half] | None:
    prompt = tokenizer.encode(row["prompt"])
    answers = [[*tokenizer.encode(row[name]), tokenizer.eos_id] for name in ("chosen", "rejected")]
    # The end-of-text token comes before the prompt, and the last token of all is a target only.
    room = limit - max(map(len, answers))
    if room < min(len(prompt), 1):
        return None
    prompt = [tokenizer.eos_id, *prompt[max(len(prompt) - room, 0) :]]
    return [
        (np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))
        for answer in answers
    ]


def _as_messages(value, role: str) -> list:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _cuts(messages: Messages):
    """Where a conversation may begin anew: at its first turn, or at any later one of the user."""
    body = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    later = [i for i in range(body + 1, len(messages)) if messages[i]["role"] == "user"]
    return [body, *later], lambda cut: [*messages[:body], *messages[cut:]]


def _first_that_fits(cuts: Sequence[int], fits) -> int | None:
    """The earliest cut that leaves few enough tokens; the later the cut, the fewer."""
    if fits(cuts[0]):
        return cuts[0]
    place = bisect.bisect_left(cuts, True, key=fits)
    return cuts[place] if place < len(cuts) else None


def _encode_turns(messages, tokenizer, template, num_earlier: int = 0) -> _Half:
    """Ids up to the last that the assistant writes; its first `num_earlier` spans do not count."""
    text, spans = template.render_with_spans(messages)
    ids, offsets = tokenizer.encode_with_offsets(text, parse_special=True)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    # Some tokenizers trim white space off the offsets, so a blank may be empty: its end tells.
    starts = np.minimum(starts, ends - 1)
    learned = np.zeros(len(ids), bool)
    for start, stop in spans[num_earlier:]:
        learned |= (ends > start) & (starts < stop)
    if not learned.any():
        raise ValueError(
            f"tasks.template: {template.name}: messages: the template marks nothing that the "
            "assistant says"
        )
    stop = int(np.flatnonzero(learned)[-1]) + 1
    return np.array(ids[:stop], np.int32), learned[:stop]


def _record(segments: list[_Half]) -> Record:
    lengths = [len(ids) - 1 for ids, _ in segments]
    return {
        "tokens": np.concatenate([ids[:-1] for ids, _ in segments]),
        "targets": np.concatenate([ids[1:] for ids, _ in segments]),
        "loss_mask": np.concatenate([learned[1:] for _, learned in segments]).astype(np.float32),
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "segment_ids": np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
    }


def _kind(value) -> str:
    if value is None or value == []:
        return "nothing"
    return type(value).__name__


def _wrong(where: str, field: str, problem: str) -> ValueError:
    return ValueError(": ".join(part for part in (where, field, problem) if part))
