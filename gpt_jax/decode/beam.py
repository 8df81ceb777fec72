"""Beam search, with the scores and the ends of Hugging Face's `generate(num_beams=...)`.

P prompts, K beams of each, R = P * K rows, M candidates, S places, V vocabulary.

A hypothesis of n new tokens scores the sum of their log-probabilities / n^length_penalty
(arXiv:1609.08144 has another form of it). Each step keeps the K best open beams of a prompt beside
the K best that ended; the whole search is one compiled loop on the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.decode import caches
from gpt_jax.decode import prompts as prompting
from gpt_jax.decode.prefill import fill
from gpt_jax.decode.prompts import MIN_BUCKET, Prompts, bucket
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.ops import sampling
from gpt_jax.types import Array, Tree

EARLY_STOPPING = (False, True, "never")
# The score of what does not count. Finite, as Hugging Face's: sums and comparisons stay ordered.
_OUT = -1e9

# (log-probabilities f32[R, V], the text so far int32[R, S], its length int32[R]) -> f32[R, V]
Rule = Callable[[Array, Array, Array], Array]


class Hypothesis(NamedTuple):
    """A continuation of a prompt.

    Attributes:
      ids: What follows the prompt, with the id that ended it.
      score: Sum of its log-probabilities / len(ids)^length_penalty.
      finish_reason: "stop" at an id that ends the text, else "length".
    """

    ids: tuple[int, ...]
    score: float
    finish_reason: str


@flax.struct.dataclass
class _State:
    """A search under way.

    Attributes:
      cache: R rows; all tokens of the open beams but their last.
      text_PKS, score_PK: Open beams, best first; the prompt is part of the text.
      ended_text_PKS, ended_score_PK, ended_length_PK: The best that ended, best first; the score
        with length penalty, the length of the new tokens.
      ended_PK: Which of these places are taken.
      improvable_P: Whether an open beam may still become better than one that ended.
      open_P: Prompts whose search goes on.
      step: New tokens of the open beams.
    """

    cache: Cache
    text_PKS: Array
    score_PK: Array
    ended_text_PKS: Array
    ended_score_PK: Array
    ended_length_PK: Array
    ended_PK: Array
    improvable_P: Array
    open_P: Array
    step: Array


def beam_search(
    model: Transformer,
    params: Tree,
    prompts: Prompts,
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    vocab_size: int | None = None,
    rule: Rule | None = None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first.

    Args:
      model: A decoder, or an encoder_decoder, whose encoder reads the prompts and whose decoder
        begins with model.config.start_id.
      params: Its parameters, without Flax's boxes.
      prompts: Token ids; their lengths may differ.
      num_beams: K.
      max_new_tokens: Most tokens of a continuation; the context's end may come first.
      eos_ids: Ids that end one.
      length_penalty: Above 0 favours long ones.
      early_stopping: When a prompt's search ends before that: True: as soon as K beams ended;
        False: when the best open beam, ended now, would not be among them; "never": when with a
        positive length_penalty none could be at full length either.
      num_return_sequences: At most num_beams.
      vocab_size: Ids from here on are never written; None: the model's.
      rule: Changes log-probabilities before they are added up, e.g. against repetitions. One
        function object is compiled once.

    Raises:
      ValueError: A value that is not allowed; the message names the field.
    """
    model = prompting.as_computed(model, params)
    config = model.config
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    _check_numbers(num_beams, max_new_tokens, num_return_sequences, early_stopping)
    num_candidates = max(2, 1 + len(eos_ids)) * num_beams
    if num_beams * vocab_size < num_candidates:
        raise ValueError(f"num_beams: {num_beams} are too many for {vocab_size} ids")
    has_encoder = config.family == "encoder_decoder"
    longest = config.seq_len - (not has_encoder)
    prompting.check_prompts(prompts, longest=longest, vocab_size=vocab_size)
    if not len(prompts):
        return []
    sources = None
    if has_encoder:
        start_id = config.start_id if config.start_id >= 0 else next(iter(eos_ids), -1)
        if start_id < 0:
            raise ValueError("eos_ids: none, but the decoder begins with one")
        sources, prompts = prompts, [[start_id]] * len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    state, limit_P = _start(
        model, params, prompts, sources, num_beams=num_beams, max_new_tokens=max_new_tokens
    )
    lengths_P = np.resize(lengths, len(limit_P))
    results = _search(
        model, params, state, lengths_P, limit_P,
        np.array(eos_ids, np.int32), np.float32(length_penalty),
        early_stopping=early_stopping, vocab_size=vocab_size, rule=rule,
        num_candidates=num_candidates,
    )  # fmt: skip
    texts_PKS, scores_PK, new_PK = jax.device_get(results)

    def hypothesis(p: int, k: int) -> Hypothesis:
        ids = tuple(texts_PKS[p, k, lengths[p] : lengths[p] + new_PK[p, k]].tolist())
        stopped = bool(ids) and ids[-1] in eos_ids
        return Hypothesis(ids, float(scores_PK[p, k]), "stop" if stopped else "length")

    return [[hypothesis(p, k) for k in range(num_return_sequences)] for p in range(len(lengths))]


def _check_numbers(num_beams, max_new_tokens, num_return_sequences, early_stopping) -> None:
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {value} is not at least 1")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences: {num_return_sequences} is not from 1 to num_beams {num_beams}"
        )
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(f"early_stopping: {early_stopping!r} is not one of {EARLY_STOPPING}")


def _start(model, params, prompts, sources, *, num_beams: int, max_new_tokens: int):
    """The state before the first step and int32[P], the most new tokens of each prompt."""
    # Prompts that fill up the batch repeat the first ones, whose search takes as long.
    P, K = bucket(len(prompts)), num_beams
    prompt_P = np.arange(P) % len(prompts)
    lengths_P = np.array([len(prompts[p]) for p in prompt_P], np.int32)
    limit_P = np.minimum(max_new_tokens, model.config.seq_len - lengths_P).astype(np.int32)
    S = min(bucket(int((lengths_P + limit_P).max()), MIN_BUCKET), model.config.seq_len)
    cache = fill(model, params, prompts, np.repeat(prompt_P, K), length=S, sources=sources)
    text_PS = prompting.padded([prompts[p] for p in prompt_P], P, S)
    text_PKS = jnp.asarray(np.repeat(text_PS[:, None], K, axis=1))
    # All beams of a prompt begin alike: only the first counts, or each would be found K times.
    score_PK = jnp.full((P, K), _OUT).at[:, 0].set(0.0)
    state = _State(
        cache, text_PKS, score_PK, jnp.zeros_like(text_PKS), jnp.full((P, K), _OUT),
        jnp.zeros((P, K), jnp.int32), jnp.zeros((P, K), bool), jnp.ones(P, bool),
        jnp.ones(P, bool), jnp.int32(0),
    )  # fmt: skip
    return state, limit_P


@functools.partial(
    jax.jit,
    static_argnames=("model", "early_stopping", "vocab_size", "rule", "num_candidates"),
)
def _search(
    model, params, state: _State, lengths_P, limit_P, eos_ids_E, penalty, *,
    early_stopping, vocab_size: int, rule: Rule | None, num_candidates: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(texts, scores, new tokens) of the best that ended."""
    step = functools.partial(
        _step, model, params, lengths_P, limit_P, eos_ids_E, penalty, early_stopping,
        vocab_size, rule, num_candidates,
    )  # fmt: skip
    state = jax.lax.while_loop(lambda state: state.open_P.any(), step, state)
    return state.ended_text_PKS, state.ended_score_PK, state.ended_length_PK


def _step(
    model, params, lengths_P, limit_P, eos_ids_E, penalty, early_stopping, vocab_size, rule,
    num_candidates, state: _State,
) -> _State:  # fmt: skip
    """One token more in each open beam."""
    P, K, S = state.text_PKS.shape
    length_P = lengths_P + state.step
    text_RS, length_R = state.text_PKS.reshape(P * K, S), jnp.repeat(length_P, K)
    last_R1 = jnp.take_along_axis(text_RS, length_R[:, None] - 1, axis=1)
    logits_R1V, cache = model.apply({"params": params}, last_R1, cache=state.cache)
    logprob_RV = jax.nn.log_softmax(logits_R1V[:, 0])
    if rule is not None:
        logprob_RV = rule(logprob_RV, text_RS, length_R)
    logprob_RV = sampling.forbid_from(logprob_RV, vocab_size)

    # With (1 + E) K candidates there are K that do not end, whatever ends.
    total_PKV = logprob_RV.reshape(P, K, -1) + state.score_PK[..., None]
    score_PM, flat_PM = jax.lax.top_k(total_PKV.reshape(P, -1), num_candidates)
    parent_PM, id_PM = jnp.divmod(flat_PM, total_PKV.shape[-1])
    text_PMS = jnp.take_along_axis(state.text_PKS, parent_PM[..., None], axis=1)
    here_S = jnp.arange(S) == length_P[:, None, None]
    text_PMS = jnp.where(here_S, id_PM[..., None], text_PMS)
    full_P1 = (state.step + 1 >= limit_P)[:, None]
    ends_PM = jnp.isin(id_PM, eos_ids_E) | full_P1

    new = _end(state, text_PMS, score_PM, ends_PM, penalty, early_stopping)
    open_score_PM = score_PM + ends_PM * _OUT
    score_PK, best_PK = jax.lax.top_k(open_score_PM, K)
    parent_PK = jnp.take_along_axis(parent_PM, best_PK, axis=1)
    new = new.replace(
        cache=caches.reordered(cache, (jnp.arange(P)[:, None] * K + parent_PK).reshape(-1)),
        text_PKS=jnp.take_along_axis(text_PMS, best_PK[..., None], axis=1),
        score_PK=score_PK,
        step=state.step + 1,
    )
    improvable_P = state.improvable_P & _may_improve(new, limit_P, penalty, early_stopping)
    open_P = improvable_P & ~full_P1[:, 0]
    if early_stopping is True:
        open_P &= ~new.ended_PK.all(1)
    return _frozen(state, new.replace(improvable_P=improvable_P, open_P=open_P))


def _end(state: _State, text_PMS, score_PM, ends_PM, penalty, early_stopping) -> _State:
    """The state with the best of the old and new hypotheses that ended."""
    K = state.score_PK.shape[1]
    new_length = state.step + 1
    score_PM = score_PM / new_length.astype(jnp.float32) ** penalty
    # Behind the K best candidates lie only substitutes for open beams.
    ends_PM &= jnp.arange(score_PM.shape[1]) < K
    takes_P = state.improvable_P
    if early_stopping is True:
        takes_P &= ~state.ended_PK.all(1)
    score_PM += jnp.where(ends_PM & takes_P[:, None], 0.0, _OUT)

    def merged(old, new):
        return jnp.concatenate([old, new], axis=1)

    scores, best_PK = jax.lax.top_k(merged(state.ended_score_PK, score_PM), K)

    def best(old, new):
        both = merged(old, new)
        index = best_PK.reshape(*best_PK.shape, *(1,) * (both.ndim - 2))
        return jnp.take_along_axis(both, index, axis=1)

    lengths_PM = jnp.full_like(ends_PM, new_length, dtype=jnp.int32)
    return state.replace(
        ended_text_PKS=best(state.ended_text_PKS, text_PMS),
        ended_score_PK=scores,
        ended_length_PK=best(state.ended_length_PK, lengths_PM),
        ended_PK=best(state.ended_PK, ends_PM),
    )


def _may_improve(state: _State, limit_P, penalty, early_stopping) -> Array:
    """bool[P]: the best open beam may become better than the worst that ended."""
    length_P = jnp.broadcast_to(state.step, limit_P.shape)
    if early_stopping == "never":
        length_P = jnp.where(penalty > 0, limit_P, length_P)
    possible_P = state.score_PK[:, 0] / length_P.astype(jnp.float32) ** penalty
    worst_P = state.ended_score_PK.min(1)
    return (~state.ended_PK.all(1) & (possible_P > _OUT)) | (possible_P > worst_P)


def _frozen(old: _State, new: _State) -> _State:
    """The new state, but of prompts whose search had ended already the old one."""

    def keep(before, after):
        open_P = old.open_P.reshape(-1, *(1,) * (before.ndim - 1))
        return jnp.where(open_P, after, before)

    names = ("text_PKS", "score_PK", "ended_text_PKS", "ended_score_PK", "ended_length_PK",
             "ended_PK", "improvable_P", "open_P")  # fmt: skip
    return new.replace(**{name: keep(getattr(old, name), getattr(new, name)) for name in names})
