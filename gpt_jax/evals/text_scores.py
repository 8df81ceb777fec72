"""The log-probability of each token of texts.

B batch, T length, V vocabulary; n texts.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.examples import Record
from gpt_jax.evals.likelihood import encode_pair
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.ops.losses import cross_entropy
from gpt_jax.tasks.encode import continuation_record, seq2seq_record, start_id
from gpt_jax.types import Array, Tree


class TextScore(NamedTuple):
    """How likely a model holds a text.

    Attributes:
      ids: Its tokens, with what the tokenizer adds; those of the context are not among them.
      logprobs: Of each, in nats; None where nothing stands before it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def logprob(self) -> float:
        """The sum of what is scored."""
        return math.fsum(x for x in self.logprobs if x is not None)

    @property
    def num_scored(self) -> int:
        """How many tokens have a log-probability."""
        return sum(x is not None for x in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; nan where nothing is scored."""
        return math.exp(-self.logprob / self.num_scored) if self.num_scored else math.nan


def score_texts(
    opened: OpenModel,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    batch_size: int = 16,
) -> list[TextScore]:
    """Scores of texts, each behind its context.

    A decoder's text begins with what its tokenizer puts before one; if that is nothing, its first
    token has no score, as in Hugging Face's loss. An encoder_decoder reads the context, and its
    text ends with what the tokenizer puts behind one.

    Args:
      opened: A model that writes text.
      texts: What is scored.
      contexts: One a text; an encoder_decoder needs them.
      batch_size: Texts at a time.

    Raises:
      ValueError: Another model, not as many contexts as texts, or a text that is empty or with its
        context too long (its number is told).
    """
    config = opened.model.config
    if config.head != "lm" or config.family == "encoder":
        field, needed = ("family", "decoder") if config.head == "lm" else ("head", "lm")
        value = getattr(config, field)
        raise ValueError(f"model.{field}: {value!r} gives no likelihoods; that needs {needed!r}")
    if contexts is None and config.family == "encoder_decoder":
        raise ValueError("contexts: None is not what an encoder_decoder's encoder reads")
    if contexts is not None and len(contexts) != len(texts):
        raise ValueError(f"contexts: {len(contexts)} are not as many as texts, {len(texts)}")
    records, scored = [], []
    for number, text in enumerate(texts):
        context = None if contexts is None else contexts[number]
        record, ids = _record(opened, text, context)
        for name in ("tokens", "encoder_tokens"):
            size = len(record.get(name, ()))
            if size > config.seq_len:
                right = f"at most the model's context of {config.seq_len}"
                raise ValueError(f"texts[{number}]: {size} tokens are not {right}")
        if not ids:
            raise ValueError(f"texts[{number}]: 0 tokens are not at least 1")
        records.append(record)
        scored.append(ids)
    found: list[TextScore | None] = [None] * len(records)
    for numbers, batch in record_batches(records, batch_size, most=config.seq_len):
        logprob_BT = jax.device_get(_logprobs(opened.params, batch, model=opened.model))
        for row, number in enumerate(numbers):
            kept = np.flatnonzero(records[number]["loss_mask"])
            values = logprob_BT[row, kept].astype(float).tolist()
            missing = len(scored[number]) - len(values)
            logprobs = (None,) * missing + tuple(values)
            found[number] = TextScore(tuple(scored[number]), logprobs)
    return found


def _record(opened: OpenModel, text: str, context: str | None) -> tuple[Record, list[int]]:
    """A text's record, whose loss counts what has a score, and the text's ids."""
    config, tokenizer = opened.model.config, opened.tokenizer
    if config.family == "encoder_decoder":
        ids = [*tokenizer.encode(text), *opened.suffix_ids]
        source = [*opened.prefix_ids, *tokenizer.encode(context), *opened.suffix_ids]
        start = start_id(tokenizer, config)
        return seq2seq_record(source, [start, *ids[:-1]], ids), ids
    if context:
        given, ids = encode_pair(tokenizer, context, text)
        given = [*opened.prefix_ids, *given]
    else:
        given, ids = [], [*opened.prefix_ids, *tokenizer.encode(text), *opened.suffix_ids]
    # Something is given in any case; what is given of the text itself has no score.
    first = max(0, 1 - len(given))
    return continuation_record([*given, *ids[:first]], ids[first:], config), ids


@functools.partial(jax.jit, static_argnames="model")
def _logprobs(params: Tree, batch: dict, *, model: Transformer) -> Array:
    """Of the targets, f32[B, T]."""
    logits_BTV = forward(model, params, batch)
    return -cross_entropy(logits_BTV, batch["targets"])[0]
