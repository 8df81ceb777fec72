"""How likely a model holds texts behind other texts, and choices by it.

B batch, T length, V vocabulary; n examples, C choices.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.examples import Record
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.ops.losses import cross_entropy
from gpt_jax.parallel import sharding
from gpt_jax.tasks.contract import Formatted
from gpt_jax.tasks.encode import continuation_record, seq2seq_record, start_id
from gpt_jax.types import Array, Tree

# How the log-likelihoods of choices of unequal length are made comparable (arXiv:2005.14165,
# section 2.4): as they are, by token, by character, by byte, and against the choice behind a mere
# cue such as "Answer:".
NORMALIZATIONS = ("sum", "token", "character", "byte", "cue")


class Continuation(NamedTuple):
    """What a model thinks of a text behind another.

    Attributes:
      logprob: Sum over its tokens, in nats.
      num_tokens: How many.
      is_greedy: Each of them is the most likely one at its place.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def continuation_logprobs(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    seq_len: int = 0,
    source_len: int = 0,
) -> list[Continuation]:
    """Log-likelihoods of (context, continuation) pairs.

    Args:
      model: A decoder or encoder_decoder with head "lm".
      params: Its parameters.
      tokenizer: Its tokenizer.
      pairs: Texts; a context too long is cut, of an encoder's input at the end, else at its start.
      batch_size: Pairs at a time.
      seq_len, source_len: Longest inputs; 0: the model's seq_len.

    Raises:
      ValueError: the model is another.
    """
    config = model.config
    if config.head != "lm":
        raise ValueError(f"model.head: {config.head!r} gives no likelihoods; that needs 'lm'")
    if config.family == "encoder":
        raise ValueError("model.family: 'encoder' gives no likelihoods; that needs 'decoder'")
    seq_len, source_len = seq_len or config.seq_len, source_len or config.seq_len
    # A pair that stands several times is computed once; nothing is sure to follow.
    distinct = [pair for pair in dict.fromkeys(pairs) if pair[1]]
    records = [
        pair_record(tokenizer, config, context, continuation, seq_len, source_len)
        for context, continuation in distinct
    ]
    found: dict[tuple[str, str], Continuation] = {}
    for numbers, batch in record_batches(records, batch_size, most=config.seq_len):
        logprob_B, greedy_B = sharding.fetch(_score(params, batch, model=model))
        for row, number in enumerate(numbers):
            size = int(records[number]["loss_mask"].sum())
            result = Continuation(float(logprob_B[row]), size, bool(greedy_B[row]))
            found[distinct[number]] = result
    return [found.get(pair, Continuation(0.0, 0, True)) for pair in pairs]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of both as they are in the joined text.

    White space at the context's end goes to the continuation, where tokenizers have it; the
    continuation is what the joined text has behind as many ids as the context has alone. Where both
    grow together to no more ids than those, each is encoded by itself.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    context_ids = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    if len(whole) <= len(context_ids):
        return context_ids, tokenizer.encode(continuation)
    return whole[: len(context_ids)], whole[len(context_ids) :]


def pair_record(
    tokenizer: Tokenizer,
    config: TransformerConfig,
    context: str,
    continuation: str,
    seq_len: int,
    source_len: int,
) -> Record:
    """The record whose loss counts the continuation, without an end-of-text token behind it."""
    if config.family == "encoder_decoder":
        source, target = tokenizer.encode(context), tokenizer.encode(continuation)
        target = target[:seq_len]
        tokens = [start_id(tokenizer, config), *target[:-1]]
        return seq2seq_record([*source[: source_len - 1], tokenizer.eos_id], tokens, target)
    given, ids = encode_pair(tokenizer, context, continuation)
    given = [tokenizer.eos_id, *given]
    # The last seq_len inputs and their targets; of what is left at least one is given.
    given = given[max(0, len(given) + len(ids) - seq_len - 1) :] or given[-1:]
    return continuation_record(given, ids[: seq_len + 1 - len(given)], config)


@functools.partial(jax.jit, static_argnames=("model",))
def _score(params: Tree, batch: dict, *, model: Transformer) -> tuple[Array, Array]:
    """Sum of the targets' log-probabilities, f32[B], and whether all are the most likely, [B]."""
    logits_BTV = forward(model, params, batch)
    targets_BT, mask_BT = batch["targets"], batch["loss_mask"]
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    logprob_BT = -cross_entropy(logits_BTV, targets_BT)[0]
    greedy_BT = chosen_BT >= logits_BTV.max(axis=-1)
    return (logprob_BT * mask_BT).sum(1), jnp.all(greedy_BT | (mask_BT == 0), axis=1)


def choice_scores(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    formatted: Sequence[Formatted],
    answer_cue: str,
    **how: int,
) -> dict[str, list[np.ndarray]]:
    """For each of NORMALIZATIONS, the scores of each example's choices, n arrays of f64[C].

    Args:
      model, params, tokenizer: As for continuation_logprobs; so is `how`.
      formatted: Examples with choices.
      answer_cue: The context of "cue".
    """
    asked = [(f.prompt, choice) for f in formatted for choice in f.choices]
    pairs = [*asked, *((answer_cue, choice) for _, choice in asked)]
    results = continuation_logprobs(model, params, tokenizer, pairs, **how)
    logprobs = np.array([result.logprob for result in results], np.float64)
    behind, alone = logprobs[: len(asked)], logprobs[len(asked) :]
    texts = [choice.strip() for _, choice in asked]
    scores = {
        "sum": behind,
        "token": behind / np.maximum(1, [result.num_tokens for result in results[: len(asked)]]),
        "character": behind / np.maximum(1, [len(text) for text in texts]),
        "byte": behind / np.maximum(1, [len(text.encode()) for text in texts]),
        "cue": behind - alone,
    }
    ends = np.cumsum([len(f.choices) for f in formatted])[:-1]
    return {name: np.split(scores[name], ends) for name in NORMALIZATIONS}
