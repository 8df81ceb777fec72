"""The one compiled program that writes: up to MAX_STEPS tokens more in each row.

B rows, S cache length, N steps, V vocabulary, E ids that end a row, k most likely tokens.

The host owns a row's last token, its length and whether it is open, and tells them with each call;
on the device lies only what is large. All but the last token of a text are in the cache; the last
one is the next step's input. So a prompt's logits, of which only the last would be used, are never
computed, and tokens are drawn in one place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.decode import caches
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.ops import penalties, sampling
from gpt_jax.parallel.sharding import constrain
from gpt_jax.types import Array, Tree

MAX_STEPS = 16
# How many of the most likely tokens a program can report; few, since each is compiled.
TOP_SIZES = (0, 5, 20)


def top_size(params: Sequence[SamplingParams]) -> int:
    """The least of TOP_SIZES that is enough for all."""
    most = max(p.top_logprobs for p in params)
    return next(size for size in TOP_SIZES if size >= most)


def rules_of(params: Sequence[SamplingParams]) -> sampling.Rules:
    """How the tokens of each row are drawn."""
    return sampling.Rules(
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_k for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
    )


def bias_of(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """f32[V]; what a row's logits get added."""
    bias_V = np.zeros(vocab_size, np.float32)
    for token_id, bias in params.logit_bias:
        bias_V[token_id] += bias
    return bias_V


@flax.struct.dataclass
class State:
    """What lies on the device of all rows. What no row needs is None, and not computed.

    Attributes:
      cache: Keys and values of all tokens of a row but its last; its index is not used.
      counts_BV: int32; how often a row generated each token.
      in_prompt_BV: bool; the tokens of its prompt.
      history_BS: int32; its tokens, for n-grams.
      bias_BV: f32; added to its logits.
    """

    cache: Cache
    counts_BV: Array | None = None
    in_prompt_BV: Array | None = None
    history_BS: Array | None = None
    bias_BV: Array | None = None


@flax.struct.dataclass
class RowParams:
    """What is fixed for a row.

    Attributes:
      rules: How its tokens are drawn.
      penalties: What its earlier tokens change.
      seeds_B, samples_B: uint32; a token's key is fold_in(fold_in(key(seed), sample), position).
      start_B: int32; the length of its prompt.
      end_B: int32; its length, prompt included, at which it is done.
      end_ids_BE: int32; the ids that end it; -1: none.
    """

    rules: sampling.Rules
    penalties: penalties.Penalties
    seeds_B: Array
    samples_B: Array
    start_B: Array
    end_B: Array
    end_ids_BE: Array


@dataclasses.dataclass(frozen=True)
class Needs:
    """What must be computed at all; each value is a program of its own.

    Attributes:
      kind: One of sampling.KINDS that is enough for all rows.
      min_tokens: Whether a row may not end yet.
      top: One of TOP_SIZES.
    """

    kind: str = "greedy"
    min_tokens: bool = False
    top: int = 0


class Steps(NamedTuple):
    """New tokens of each row.

    Attributes:
      tokens_BN: int32.
      logprobs_BN: f32; under the model's own softmax, before any rule.
      top_ids_BNk, top_logprobs_BNk: int32 and f32; of the most likely tokens.
      count_B: int32; how many of the N are the row's.
    """

    tokens_BN: Array
    logprobs_BN: Array
    top_ids_BNk: Array
    top_logprobs_BNk: Array
    count_B: Array


class _Live(NamedTuple):
    """Of each row: its last token, its length, whether it takes more tokens."""

    token_B: Array
    length_B: Array
    open_B: Array


@functools.partial(
    jax.jit, static_argnames=("model", "needs", "vocab_size"), donate_argnames=("state",)
)
def decode(
    model: Transformer,
    params: Tree,
    state: State,
    rows: RowParams,
    live_3B: Array,
    num_steps: Array | int,
    leave_early: Array | bool,
    allowed_BV: Array | None = None,
    *,
    needs: Needs,
    vocab_size: int,
) -> tuple[State, Steps]:
    """Up to num_steps tokens for each open row; ends early when all rows are done.

    Args:
      model: The Transformer.
      params: Its parameters.
      state: Donated.
      rows: What is fixed for each row.
      live_3B: int32; last tokens, lengths, and 1 for rows that are open.
      num_steps: At most MAX_STEPS; an array, so that another number compiles nothing.
      leave_early: End as soon as one row is done: somebody waits for its place.
      allowed_BV: bool; what constraints allow, for one step.
      needs: What the rows need.
      vocab_size: Ids from here on are never drawn.
    """
    B = live_3B.shape[1]
    live = _Live(live_3B[0], live_3B[1], live_3B[2] > 0)
    keys_B = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        rows.seeds_B, rows.samples_B
    )
    step = functools.partial(
        _step, model, params, rows, keys_B, allowed_BV, needs=needs, vocab_size=vocab_size
    )

    def body(carry):
        i, state, now, steps = carry
        state, after, logprob_B, top_ids_Bk, top_logprobs_Bk = step(state, now)
        steps = Steps(
            steps.tokens_BN.at[:, i].set(after.token_B),
            steps.logprobs_BN.at[:, i].set(logprob_B),
            steps.top_ids_BNk.at[:, i].set(top_ids_Bk),
            steps.top_logprobs_BNk.at[:, i].set(top_logprobs_Bk),
            steps.count_B + now.open_B,
        )
        return i + 1, state, after, steps

    def unfinished(carry):
        i, _, now, _ = carry
        left = leave_early & (now.open_B != live.open_B).any()
        return (i < num_steps) & now.open_B.any() & ~left

    k = min(needs.top, vocab_size)
    start = Steps(
        jnp.zeros((B, MAX_STEPS), jnp.int32), jnp.zeros((B, MAX_STEPS), jnp.float32),
        jnp.zeros((B, MAX_STEPS, k), jnp.int32), jnp.zeros((B, MAX_STEPS, k), jnp.float32),
        jnp.zeros(B, jnp.int32),
    )  # fmt: skip
    state = state.replace(cache=state.cache.replace(index_B=live.length_B - 1))
    _, state, _, steps = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, live, start))
    return state, steps


def _step(
    model, params, rows: RowParams, keys_B, allowed_BV, state: State, live: _Live, *, needs,
    vocab_size,
):  # fmt: skip
    """One token more in each open row, its log-probability and the most likely ones."""
    # A row that is done stays where it is: its index would run out of the cache.
    cache = state.cache.replace(index_B=live.length_B - 1)
    logits_B1V, cache = model.apply({"params": params}, live.token_B[:, None], cache=cache)
    state, logits_BV = state.replace(cache=caches.laid(cache)), logits_B1V[:, 0]
    ruled_BV = _ruled(logits_BV, state, rows, live.length_B, allowed_BV, needs, vocab_size)
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, live.length_B)
    drawn_B = sampling.draw(ruled_BV, step_keys_B, rows.rules, kind=needs.kind)
    token_B = jnp.where(live.open_B, drawn_B, live.token_B)
    logprob_B = penalties.logprobs_of(logits_BV, token_B[:, None])[:, 0]
    top_ids_Bk, top_logprobs_Bk = top_of(logits_BV, needs.top, vocab_size)

    length_B = live.length_B + live.open_B
    ended_B = (token_B[:, None] == rows.end_ids_BE).any(1) | (length_B >= rows.end_B)
    state = _remember(state, token_B, live)
    state = state.replace(cache=state.cache.replace(index_B=length_B - 1))
    after = _Live(token_B, length_B, live.open_B & ~ended_B)
    return state, after, logprob_B, top_ids_Bk, top_logprobs_Bk


def top_of(logits_BV: Array, top: int, vocab_size: int) -> tuple[Array, Array]:
    """The most likely ids and their log-probabilities, [B, k]; never ids that only pad."""
    if not top:
        B = logits_BV.shape[0]
        return jnp.zeros((B, 0), jnp.int32), jnp.zeros((B, 0), jnp.float32)
    known_BV = sampling.forbid_from(logits_BV, vocab_size)
    ids_Bk, _ = penalties.top_logprobs(known_BV, min(top, vocab_size))
    return ids_Bk, penalties.logprobs_of(logits_BV, ids_Bk)


def _ruled(logits_BV, state: State, rows: RowParams, length_B, allowed_BV, needs, vocab_size):
    """Logits after all that forbids or changes them, in the order of SamplingParams."""
    known_BV = ruled_BV = sampling.forbid_from(logits_BV, vocab_size)
    if state.bias_BV is not None:
        ruled_BV = ruled_BV + state.bias_BV
    if state.counts_BV is not None:
        ruled_BV = penalties.penalize(
            ruled_BV, rows.penalties, counts_BV=state.counts_BV, in_prompt_BV=state.in_prompt_BV
        )
    if state.history_BS is not None:
        ruled_BV = penalties.forbid_ngrams(
            ruled_BV, state.history_BS, length_B, rows.penalties.ngram_B
        )
    if needs.min_tokens:
        early_B = length_B - rows.start_B < rows.penalties.min_length_B
        ruled_BV = penalties.forbid(ruled_BV, rows.end_ids_BE, early_B)
    if allowed_BV is not None:
        ruled_BV = penalties.constrain(ruled_BV, allowed_BV, known_BV)
    return ruled_BV


def _remember(state: State, token_B: Array, live: _Live) -> State:
    """The state with the new tokens counted and written down."""
    rows_B = jnp.arange(len(token_B))
    if state.counts_BV is not None:
        counts_BV = state.counts_BV.at[rows_B, token_B].add(live.open_B.astype(jnp.int32))
        state = state.replace(counts_BV=constrain(counts_BV, "batch", None))
    if state.history_BS is not None:
        # A row that is done writes nowhere.
        place_B = jnp.where(live.open_B, live.length_B, state.history_BS.shape[1])
        history_BS = state.history_BS.at[rows_B, place_B].set(token_B, mode="drop")
        state = state.replace(history_BS=constrain(history_BS, "batch", None))
    return state


@functools.partial(jax.jit, donate_argnames=("state",))
def place(
    state: State, filled: Cache, row: Array, slot: Array, prompt_S: Array, bias_V: Array | None
) -> State:
    """The state with a row that begins.

    Args:
      state: Donated.
      filled: A cache that holds all but the last token of its prompt.
      row: Which row there.
      slot: Which row here.
      prompt_S: int32; its prompt, with -1 behind it.
      bias_V: f32; what is added to its logits, if state.bias_BV is there.
    """
    new = state.replace(cache=caches.with_row(state.cache, filled, row, slot))
    if state.counts_BV is not None:
        V = state.counts_BV.shape[1]
        in_prompt_V = (
            jnp.zeros(V, bool).at[jnp.where(prompt_S < 0, V, prompt_S)].set(True, mode="drop")
        )
        new = new.replace(
            counts_BV=_laid_rows(state.counts_BV.at[slot].set(0)),
            in_prompt_BV=_laid_rows(state.in_prompt_BV.at[slot].set(in_prompt_V)),
        )
    if state.history_BS is not None:
        new = new.replace(history_BS=_laid_rows(state.history_BS.at[slot].set(prompt_S)))
    if state.bias_BV is not None:
        new = new.replace(bias_BV=_laid_rows(state.bias_BV.at[slot].set(bias_V)))
    return new


@functools.partial(jax.jit, static_argnames=("length", "memory_length"))
def resized(state: State, rows_B: Array, *, length: int, memory_length: int) -> State:
    """The state of other rows and places; rows_B says which old row each is."""

    def take(array: Array | None) -> Array | None:
        return None if array is None else _laid_rows(array[rows_B])

    history_BS = state.history_BS
    if history_BS is not None:
        missing = max(0, length - history_BS.shape[1])
        history_BS = jnp.pad(history_BS[:, :length], ((0, 0), (0, missing)))
    return State(
        caches.resized(state.cache, rows_B, length=length, memory_length=memory_length),
        take(state.counts_BV), take(state.in_prompt_BV), take(history_BS), take(state.bias_BV),
    )  # fmt: skip


def _laid_rows(array_BX: Array) -> Array:
    return constrain(array_BX, "batch", None)
