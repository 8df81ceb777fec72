"""From what is asked to what a model reads: a record by the model's family and head.

n tokens of a record (T without padding), m of an encoder's input.  What is too long is cut where it
matters least, but a target never is: such an example gives no record.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.data.examples import Record
from gpt_jax.data.prefixes import prefix_ranks
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.tasks.contract import Formatted, Task


def encode_all(
    task: Task,
    formatted: Sequence[Formatted],
    tokenizer: Tokenizer,
    config: TransformerConfig,
    seq_len: int,
    source_len: int = 0,
) -> tuple[list[Record], int]:
    """The records of examples, and how many were left out because their target is too long.

    Raises:
      ValueError: the model cannot do the task, or an answer lies on no token.
    """
    task.check_model(config.head, config.num_classes)
    records = []
    for number, example in enumerate(formatted, 1):
        try:
            record = encode(example, tokenizer, config, seq_len, source_len)
        except ValueError as error:
            raise ValueError(f"tasks.{task.name}: example {number}: {error}") from None
        if record is not None:
            records.append(record)
    return records, len(formatted) - len(records)


def encode(
    formatted: Formatted,
    tokenizer: Tokenizer,
    config: TransformerConfig,
    seq_len: int,
    source_len: int = 0,
) -> Record | None:
    """The record of one example; None: its target has no place in seq_len tokens.

    decoder, "lm": eos, prompt, target; the loss counts the target and, unless it has an open end,
      the eos behind it. The prompt is cut at its start.
    encoder_decoder: encoder_tokens are prompt and eos, cut at the end (`keep_end`: at the start);
      tokens are the start id and the target.
    "sequence", "span": cls, text, sep, and where there is a pair that and sep; the longer is cut at
      its end. Targets: the class (float32: the number), or first and last token of the answer.
    "tokens": cls, words, sep; the class of a word stands on its first token, words at the end may
      be cut off.

    Raises:
      ValueError: an answer lies on no token.
    """
    if config.head == "lm":
        seq2seq = config.family == "encoder_decoder"
        encode_text = _encode_source_and_target if seq2seq else _encode_prompt_and_target
        return encode_text(formatted, tokenizer, config, seq_len, source_len)
    return _ENCODERS[config.head](formatted, tokenizer, config, seq_len)


def encode_inputs(
    formatted: Formatted, tokenizer: Tokenizer, config: TransformerConfig, seq_len: int
) -> Record:
    """The record of an example that is only asked, for the heads of classes and spans."""
    unanswered = dataclasses.replace(formatted, answer_start=-1, label=formatted.label or 0)
    record = encode(unanswered, tokenizer, config, seq_len)
    assert record is not None
    return record


def prompt_ids(formatted: Formatted, tokenizer: Tokenizer, room: int) -> list[int]:
    """The last `room` tokens of the prompt."""
    ids = tokenizer.encode(formatted.prompt)
    return ids[max(0, len(ids) - room) :]


def source_ids(formatted: Formatted, tokenizer: Tokenizer, source_len: int) -> list[int]:
    """What an encoder_decoder's encoder reads: prompt and eos, at most source_len tokens."""
    ids = tokenizer.encode(formatted.prompt)
    cut = max(0, len(ids) - (source_len - 1))
    return [*(ids[cut:] if formatted.keep_end else ids[: len(ids) - cut]), tokenizer.eos_id]


def _encode_prompt_and_target(formatted, tokenizer, config, seq_len, source_len) -> Record | None:
    # Apart, as when text is generated behind the prompt.
    target = [*tokenizer.encode(formatted.target), tokenizer.eos_id]
    room = seq_len - len(target)
    if room < min(1, len(formatted.prompt)):
        return None
    prompt = prompt_ids(formatted, tokenizer, room)
    record = continuation_record([tokenizer.eos_id, *prompt], target, config)
    if formatted.open_end:
        record["loss_mask"][-1] = 0.0
    return record


def continuation_record(
    context: Sequence[int], continuation: Sequence[int], config: TransformerConfig
) -> Record:
    """A decoder's record of ids, of which those behind the context count."""
    ids = np.array([*context, *continuation], np.int32)
    places = np.arange(len(ids) - 1, dtype=np.int32)
    record = _record(ids[:-1], ids[1:], places >= len(context) - 1)
    if config.read_prompts_whole:
        ranks = prefix_ranks(places, len(context))
        record |= {"key_ranks": ranks, "query_ranks": ranks}
    return record


def seq2seq_record(source: Sequence[int], tokens: Sequence[int], targets: Sequence[int]) -> Record:
    """An encoder_decoder's record of ids; all targets count."""
    record = _record(tokens, targets, np.ones(len(targets)))
    return {**record, "encoder_tokens": np.array(source, np.int32)}


def start_id(tokenizer: Tokenizer, config: TransformerConfig) -> int:
    """What the decoder of an encoder_decoder begins with."""
    return tokenizer.eos_id if config.start_id < 0 else config.start_id


def _encode_source_and_target(formatted, tokenizer, config, seq_len, source_len) -> Record | None:
    target = tokenizer.encode(formatted.target)
    if len(target) + 1 > seq_len:
        return None
    source = source_ids(formatted, tokenizer, source_len)
    tokens = [start_id(tokenizer, config), *target]
    return seq2seq_record(source, tokens, [*target, tokenizer.eos_id])


def _encode_sequence(formatted, tokenizer, config, seq_len) -> Record:
    inputs = read_texts(formatted, tokenizer, seq_len)
    dtype = np.float32 if isinstance(formatted.label, float) else np.int32
    target = np.array(formatted.label, dtype)
    return _with_types(config, inputs, _record(inputs.ids, target, 1.0))


def _encode_span(formatted, tokenizer, config, seq_len) -> Record | None:
    inputs = read_texts(formatted, tokenizer, seq_len)
    first = last = 0  # cls: there is no answer
    if formatted.answer_start >= 0:
        end = formatted.answer_start + len(formatted.target)
        places = [i for i, (a, b) in enumerate(inputs.offsets)
                  if a < end and b > formatted.answer_start]  # fmt: skip
        if end > inputs.pair_end:
            return None
        if not places:
            text = f"{formatted.target!r} at character {formatted.answer_start}"
            raise ValueError(f"answer_start: {text} lies on no token")
        first, last = inputs.pair_start + places[0], inputs.pair_start + places[-1]
    targets = np.array([first, last], np.int32)
    return _with_types(config, inputs, _record(inputs.ids, targets, np.ones(2)))


def _encode_words(formatted, tokenizer, config, seq_len) -> Record:
    ids, starts = read_words(formatted, tokenizer, seq_len)
    targets, mask = np.zeros(len(ids), np.int32), np.zeros(len(ids))
    for start, label in zip(starts, formatted.word_labels, strict=True):
        if start >= 0:
            targets[start], mask[start] = label, 1.0
    return _record(ids, targets, mask)


_ENCODERS = {"sequence": _encode_sequence, "span": _encode_span, "tokens": _encode_words}


class Texts(NamedTuple):
    """One or two texts as an encoder reads them.

    Attributes:
      ids: cls, text, sep, pair, sep.
      pair_start: Where the pair begins; len(ids) without one.
      pair_end: Characters of the pair that are in.
      offsets: (start, end) of the characters of the pair of each of its tokens.
    """

    ids: list[int]
    pair_start: int
    pair_end: int
    offsets: list[tuple[int, int]]


def read_texts(formatted: Formatted, tokenizer: Tokenizer, seq_len: int) -> Texts:
    """`text` (else the prompt) and `pair` in at most seq_len tokens; the longer one is cut."""
    text = tokenizer.encode(formatted.text or formatted.prompt)
    pair, offsets = tokenizer.encode_with_offsets(formatted.pair) if formatted.pair else ([], [])
    room = max(0, seq_len - (3 if pair else 2))
    text = text[: max(room - len(pair), room // 2 if pair else room)]
    kept = room - len(text)
    pair_end = len(formatted.pair) if kept >= len(pair) else offsets[kept][0]
    ids = [tokenizer.cls_id, *text, tokenizer.sep_id]
    pair_start = len(ids)
    if pair:
        ids += [*pair[:kept], tokenizer.sep_id]
    return Texts(ids, pair_start, pair_end, offsets[:kept])


def read_words(
    formatted: Formatted, tokenizer: Tokenizer, seq_len: int
) -> tuple[list[int], list[int]]:
    """Ids of cls, words, sep, and where each word begins in them; -1: it is cut or has no token.

    Words are encoded one by one: where nothing stands between them, as in Chinese, a token of the
    whole could span two words, and neither would have a place of its own.
    """
    pieces = [formatted.joiner * (i > 0) + word for i, word in enumerate(formatted.words)]
    ids, starts = [tokenizer.cls_id], []
    for piece in tokenizer.encode_batch(pieces):
        fits = piece and len(ids) + len(piece) < seq_len
        starts.append(len(ids) if fits else -1)
        if fits:
            ids += piece
        elif piece:
            seq_len = 0  # nothing behind the first word that is cut
    return [*ids, tokenizer.sep_id], starts


def _record(tokens, targets, loss_mask) -> Record:
    targets = np.asarray(targets)
    if targets.dtype != np.float32:
        targets = targets.astype(np.int32)
    return {
        "tokens": np.asarray(tokens, np.int32),
        "targets": targets,
        "loss_mask": np.asarray(loss_mask, np.float32),
    }


def _with_types(config: TransformerConfig, inputs: Texts, record: Record) -> Record:
    """Token types: 0 for the text, 1 for the pair, where the model has them."""
    if not config.num_token_types:
        return record
    types = np.arange(len(inputs.ids)) >= inputs.pair_start
    return {**record, "token_types": np.minimum(types, config.num_token_types - 1).astype(np.int32)}
