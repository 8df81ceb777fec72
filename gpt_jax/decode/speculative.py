"""Speculative decoding (arXiv:2211.17192, arXiv:2302.01318): several tokens of one forward pass.

A small model, or what stood in the text before, drafts K tokens; the target reads them in one pass
and keeps the first ones so that its text is distributed as without them (decode.acceptance).

B rows (samples of prompts), K drafted tokens, S places, V vocabulary. The whole text is one
compiled loop, for places where nobody waits for its first token.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from gpt_jax.decode import prompts as prompting
from gpt_jax.decode import speculative_loop as loop
from gpt_jax.decode.loop import bias_of, rules_of
from gpt_jax.decode.prefill import fill
from gpt_jax.decode.prompts import MIN_BUCKET, Prompts, bucket
from gpt_jax.decode.request import Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Transformer
from gpt_jax.ops import sampling
from gpt_jax.types import Array, Tree

# Rules whose outcome at a place depends on the drafts before it, and the value that asks for none.
_UNSUPPORTED = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram": 0,
}


class HasModel(Protocol):
    """A model and its parameters without Flax's boxes, e.g. a Run or an OpenModel.

    Where target and draft both have a `tokenizer` too, it must be the same.
    """

    model: Transformer
    params: Tree


@dataclasses.dataclass(frozen=True)
class Stats:
    """What drafts were good for.

    Attributes:
      passes: Forward passes of the target.
      tokens: Tokens that came of them.
      drafted: Drafted tokens that had a place before the text's end.
      accepted: How many of them became part of the text.
    """

    passes: int
    tokens: int
    drafted: int
    accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted of the drafted tokens; 0 where there were none."""
        return self.accepted / max(self.drafted, 1)

    def __add__(self, other: "Stats") -> "Stats":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Stats(*(a + b for a, b in pairs))


class Sample(NamedTuple):
    """A continuation of a prompt.

    Attributes:
      tokens: With the id that ended it.
      finish_reason: "stop" at an id that ends the text, else "length".
      stats: Of this sample's drafts.
    """

    tokens: tuple[Token, ...]
    finish_reason: str
    stats: Stats


def speculate(
    target: HasModel,
    draft: HasModel | None,
    prompts: Prompts,
    params: SamplingParams,
    num_draft: int = 4,
    *,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
) -> list[list[Sample]]:
    """params.n continuations of each prompt, as the target alone writes them.

    At temperature 0 they are the target's own, token by token; else they have its distribution,
    but a seed gives other texts than it does without drafts.

    Args:
      target: A decoder.
      draft: A faster one with the same token ids; None: what followed the text's last tokens where
        they stood before in it (prompt lookup).
      prompts: Token ids; their lengths may differ.
      params: How to continue; its stop strings are for who turns ids into text.
      num_draft: K.
      eos_ids: Ids that end a text.
      vocab_size: Ids from here on are never written; None: the target's.

    Raises:
      ValueError: A value that is not allowed; the message names the field.
    """
    models = [prompting.as_computed(target.model, target.params)]
    if draft is not None:
        models.append(prompting.as_computed(draft.model, draft.params))
    for model in models:
        if model.config.family != "decoder":
            raise ValueError(
                f"model.family: {model.config.family!r} takes no drafts, a decoder does"
            )
    vocab_size = _common_vocab_size(target, draft, vocab_size)
    _check_params(params, num_draft, vocab_size)
    context = models[0].config.seq_len
    prompting.check_prompts(prompts, longest=context - 1, vocab_size=vocab_size)
    if not len(prompts):
        return []

    num_rows, B = len(prompts) * params.n, bucket(len(prompts) * params.n)
    prompt_B = np.arange(B) // params.n % len(prompts)
    lengths_B = np.array([len(prompts[p]) for p in prompt_B], np.int32)
    end_B = np.minimum(lengths_B + params.max_tokens, context).astype(np.int32)
    # The last pass may read K drafts more than the text has places for.
    S = bucket(int(end_B.max()), MIN_BUCKET) + num_draft
    caches = [
        fill(model, one.params, prompts, prompt_B, length=S)
        for model, one in zip(models, (target, draft), strict=False)
    ]
    text_BS = prompting.padded([prompts[p] for p in prompt_B], B, S)
    # Rows that fill up the batch take no tokens.
    done_B = (np.arange(B) >= num_rows) | (lengths_B >= end_B)
    state = loop.start(
        caches, text_BS, lengths_B, done_B, min(params.top_logprobs, vocab_size)
    )  # fmt: skip
    ends = params.ends(eos_ids)
    rules = rules_of([params] * B)
    row = loop.Row(rules, _row_keys(params.seed, np.arange(B) % params.n), end_B, lengths_B)
    state = loop.decode(
        tuple(models), tuple(one.params for one in (target, draft) if one is not None), state, row,
        _end_ids(ends), bias_of(params, vocab_size), np.int32(params.min_tokens),
        kind=sampling.kind_for(rules), num_draft=num_draft, vocab_size=vocab_size,
    )  # fmt: skip
    samples = _samples(state, lengths_B, num_rows, ends)
    return [samples[i : i + params.n] for i in range(0, num_rows, params.n)]


def _common_vocab_size(target: HasModel, draft: HasModel | None, vocab_size: int | None) -> int:
    """V; the ids of target and draft must be the same."""
    own = target.model.config.vocab_size
    if vocab_size is not None and vocab_size > own:
        raise ValueError(f"vocab_size: {vocab_size} is not at most the model's {own}")
    if draft is None:
        return own if vocab_size is None else vocab_size
    tokenizers = [getattr(one, "tokenizer", None) for one in (target, draft)]
    if all(tokenizers):
        if tokenizers[0].fingerprint != tokenizers[1].fingerprint:
            raise ValueError("draft: its tokenizer is not the target's: the ids mean other tokens")
        vocab_size = vocab_size or tokenizers[0].vocab_size
    theirs = draft.model.config.vocab_size
    # Beyond the tokenizer's ids the embeddings may be padded differently.
    if theirs != own and (vocab_size is None or theirs < vocab_size):
        raise ValueError(f"draft: its vocabulary of {theirs} ids is not the target's of {own}")
    return own if vocab_size is None else vocab_size


def _check_params(params: SamplingParams, num_draft: int, vocab_size: int) -> None:
    if num_draft < 1:
        raise ValueError(f"num_draft: {num_draft} is not at least 1")
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(params, name)
        if value != neutral:
            raise ValueError(f"{name}: {value} goes with no drafts; leave it at {neutral}")
    unknown = [i for i, _ in params.logit_bias if i >= vocab_size]
    if unknown:
        raise ValueError(f"logit_bias: {unknown[0]} is not an id from 0 to {vocab_size - 1}")


def _end_ids(ends: tuple[int, ...]) -> np.ndarray:
    """int32[E], filled up with an id that nothing has: few sizes, so few programs to compile."""
    ends_E = np.full(bucket(len(ends), 4), -1, np.int32)
    ends_E[: len(ends)] = ends
    return ends_E


def _row_keys(seed: int, sample_B: np.ndarray) -> Array:
    """A key a row, of the seed and the sample's number: nothing of the batch goes into it."""
    key = jax.random.key(np.uint32(seed))
    return jax.vmap(functools.partial(jax.random.fold_in, key))(sample_B.astype(np.uint32))


def _samples(state: loop.State, begin_B, num_rows: int, ends: tuple[int, ...]) -> list[Sample]:
    state = jax.device_get(state.replace(caches=[]))
    samples = []
    for b in range(num_rows):
        places = range(begin_B[b], state.length_B[b])
        tokens = tuple(
            Token(
                int(state.text_BS[b, s]),
                float(state.logprob_BS[b, s]),
                tuple(zip(state.top_ids_BSk[b, s].tolist(), state.top_BSk[b, s].tolist(),
                          strict=True)),
            )
            for s in places
        )  # fmt: skip
        stopped = bool(tokens) and tokens[-1].id in ends
        stats = Stats(
            int(state.passes_B[b]), len(tokens), int(state.drafted_B[b]), int(state.accepted_B[b])
        )
        samples.append(Sample(tokens, "stop" if stopped else "length", stats))
    return samples
