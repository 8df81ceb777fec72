"""The compiled loop of speculative decoding: draft, verify, keep, until all rows are done.

B rows (samples of prompts), K drafted tokens, T = K + 1, S places, V vocabulary. Rows keep
different numbers of drafts; a cache forgets the others when its index goes back.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.decode import prompts as prompting
from gpt_jax.decode.acceptance import accept, accept_greedy, look_up
from gpt_jax.decode.loop import top_of
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.ops import penalties, sampling
from gpt_jax.types import Array, Tree


@flax.struct.dataclass
class Row:
    """What is fixed for each row.

    Attributes:
      rules: How its tokens are drawn.
      keys_B: Its base key; a round's key is folded in with the text's length.
      end_B: int32; its length, prompt included, at which it is done.
      begin_B: int32; the prompt's length.
    """

    rules: sampling.Rules
    keys_B: Array
    end_B: Array
    begin_B: Array


@flax.struct.dataclass
class State:
    """Rows under way.

    Attributes:
      caches: The target's, of all tokens of a row but its last, and the draft's, which may lack
        one more.
      text_BS, length_B: Prompt and text.
      done_B: Rows that take no more tokens.
      logprob_BS, top_ids_BSk, top_BSk: Of the text's tokens, under the target's softmax.
      passes_B, drafted_B, accepted_B: See speculative.Stats.
    """

    caches: list[Cache]
    text_BS: Array
    length_B: Array
    done_B: Array
    logprob_BS: Array
    top_ids_BSk: Array
    top_BSk: Array
    passes_B: Array
    drafted_B: Array
    accepted_B: Array


def start(caches, text_BS, lengths_B, done_B, k: int) -> State:
    B, S = text_BS.shape
    counts = (jnp.zeros(B, jnp.int32) for _ in range(3))
    return State(
        caches, jnp.asarray(text_BS), jnp.asarray(lengths_B), jnp.asarray(done_B),
        jnp.zeros((B, S)), jnp.zeros((B, S, k), jnp.int32), jnp.zeros((B, S, k)), *counts,
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("models", "kind", "num_draft", "vocab_size"),
    donate_argnames=("state",),
)
def decode(
    models: tuple[Transformer, ...], params: tuple[Tree, ...], state: State, row: Row,
    ends_E, bias_V, min_tokens, *, kind: str, num_draft: int, vocab_size: int,
) -> State:  # fmt: skip
    """Rounds of draft and verification until all rows are done.

    Args:
      models: The target and, unless drafts are looked up in the text, the draft.
      params: Of each of them.
      state: Donated.
      row: What is fixed for each row.
      ends_E: int32 ids that end a text; -1: none.
      bias_V: f32, added to the logits.
      min_tokens: Before so many new tokens no text ends.
      kind: One of sampling.KINDS that is enough for row.rules, the same in all rows.
      num_draft: K.
      vocab_size: V; ids from here on are never drawn.
    """

    def allowed(logits_BTV, generated_BT):
        """What may be drawn, [B, T, V]; generated_BT: tokens that the text has by then."""
        logits_BTV = logits_BTV[..., :vocab_size] + bias_V
        is_end_V = jnp.isin(jnp.arange(vocab_size), ends_E)
        early_BT = generated_BT < min_tokens
        return jnp.where(early_BT[..., None] & is_end_V, -jnp.inf, logits_BTV)

    def one_round(state: State) -> State:
        return _round(models, params, state, row, ends_E, allowed, kind, num_draft, vocab_size)

    return jax.lax.while_loop(lambda state: ~state.done_B.all(), one_round, state)


def _round(
    models, params, state: State, row: Row, ends_E, allowed, kind, K, vocab_size: int
) -> State:
    length_B = state.length_B
    generated_BT = (length_B - row.begin_B)[:, None] + jnp.arange(K + 1)
    keys_B = jax.vmap(jax.random.fold_in)(row.keys_B, length_B)
    caches = list(state.caches)
    if len(models) > 1:
        caches[1], drafted_BK, q_BKV = _draft(
            models[1], params[1], state, keys_B, row.rules, allowed, generated_BT, kind, K
        )
        num_drafted_B = jnp.full_like(length_B, K)
    else:
        drafted_BK, num_drafted_B = look_up(state.text_BS, length_B, K)
        q_BKV = None

    last_B1 = jnp.take_along_axis(state.text_BS, length_B[:, None] - 1, axis=1)
    read_BT = jnp.concatenate([last_B1, drafted_BK], axis=1)
    cache = caches[0].replace(index_B=length_B - 1)
    logits_BTV, caches[0] = _forward(models[0], params[0], read_BT, cache)
    drawn_BTV = allowed(logits_BTV, generated_BT)
    if kind == "greedy":
        best_BT = sampling.most_likely(drawn_BTV)
        tokens_BT, accepted_B = accept_greedy(best_BT, drafted_BK, num_drafted_B)
    else:
        p_BTV = _probabilities(drawn_BTV, row.rules, kind)
        if q_BKV is None:
            q_BKV = jax.nn.one_hot(drafted_BK, p_BTV.shape[-1])
        # The keys folded with less than K have drawn the drafts.
        own_B = jax.vmap(lambda key: jax.random.fold_in(key, K))(keys_B)
        tokens_BT, accepted_B = accept(p_BTV, q_BKV, drafted_BK, num_drafted_B, own_B)

    place_T = jnp.arange(K + 1)
    left_B = jnp.where(state.done_B, 0, row.end_B - length_B)
    ended_BT = jnp.isin(tokens_BT, ends_E) & (place_T < (accepted_B + 1)[:, None])
    until_end_B = jnp.where(ended_BT.any(1), jnp.argmax(ended_BT, axis=1) + 1, K + 1)
    count_B = jnp.minimum(jnp.minimum(accepted_B + 1, until_end_B), left_B).astype(jnp.int32)
    new_B = length_B + count_B
    if len(models) > 1:
        # The draft has read all but the last of its tokens.
        known_B = jnp.minimum(length_B + K - 1, new_B - 1)
        caches[1] = caches[1].replace(index_B=known_B)
    state = _written(state, tokens_BT, count_B, logits_BTV, vocab_size)
    return state.replace(
        caches=caches,
        length_B=new_B,
        done_B=state.done_B
        | (ended_BT & (place_T < count_B[:, None])).any(1)
        | (new_B >= row.end_B),
        passes_B=state.passes_B + ~state.done_B,
        drafted_B=state.drafted_B + jnp.minimum(num_drafted_B, left_B),
        accepted_B=state.accepted_B + jnp.minimum(accepted_B, count_B),
    )


def _draft(model, params, state: State, keys_B, rules, allowed, generated_BT, kind, K):
    """The draft's cache, its tokens int32[B, K] and, unless greedy, their q [B, K, V]."""
    cache, length_B = state.caches[1], state.length_B
    # One or two tokens are new to it; what is read behind the text's end is overwritten.
    new_B2 = cache.index_B[:, None] + jnp.arange(2)
    read_B2 = jnp.take_along_axis(state.text_BS, new_B2, axis=1)
    logits_B2V, cache = _forward(model, params, read_B2, cache)
    at_B11 = (length_B - 1 - new_B2[:, 0])[:, None, None]
    logits_B1V = jnp.take_along_axis(logits_B2V, at_B11, axis=1)
    cache = cache.replace(index_B=length_B)

    def draw(i, logits_B1V):
        generated_B1 = jax.lax.dynamic_slice_in_dim(generated_BT, i, 1, axis=1)
        logits_B1V = allowed(logits_B1V, generated_B1)
        if kind == "greedy":
            return sampling.most_likely(logits_B1V[:, 0]), None
        q_BV = _probabilities(logits_B1V, rules, kind)[:, 0]
        own_B = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B)
        return jax.vmap(jax.random.categorical)(own_B, jnp.log(q_BV)).astype(jnp.int32), q_BV

    def step(carry, i):
        cache, token_B = carry
        logits_B1V, cache = _forward(model, params, token_B[:, None], cache)
        token_B, q_BV = draw(i, logits_B1V)
        return (cache, token_B), (token_B, q_BV)

    first_B, first_q_BV = draw(0, logits_B1V)
    (cache, _), (tokens_KB, q_KBV) = jax.lax.scan(step, (cache, first_B), jnp.arange(1, K))
    drafted_BK = jnp.concatenate([first_B[None], tokens_KB]).T
    if q_KBV is None:
        return cache, drafted_BK, None
    return cache, drafted_BK, jnp.concatenate([first_q_BV[None], q_KBV]).swapaxes(0, 1)


def _forward(model: Transformer, params: Tree, tokens_BT: Array, cache: Cache):
    where_BT = cache.index_B[:, None] + jnp.arange(tokens_BT.shape[1])
    where_BT = prompting.inside_context(model, where_BT)
    return model.apply({"params": params}, tokens_BT, where_BT, cache=cache)


def _probabilities(logits_BTV: Array, rules: sampling.Rules, kind: str) -> Array:
    """What tokens are drawn with, f32[B, T, V]."""
    restrict = functools.partial(sampling.restrict, rules=rules, kind=kind)
    return jax.nn.softmax(jax.vmap(restrict, in_axes=1, out_axes=1)(logits_BTV), axis=-1)


def _written(state: State, tokens_BT, count_B, logits_BTV, vocab_size: int) -> State:
    """The first count_B tokens of each row behind its text, with their log-probabilities."""
    B, T = tokens_BT.shape
    S, k = state.text_BS.shape[1], state.top_BSk.shape[-1]
    logits_RV = logits_BTV.reshape(B * T, -1)
    logprob_R1 = penalties.logprobs_of(logits_RV, tokens_BT.reshape(-1, 1))
    top_ids_Rk, top_Rk = top_of(logits_RV, k, vocab_size)
    place_T = jnp.arange(T)
    at_BT = jnp.where(place_T < count_B[:, None], state.length_B[:, None] + place_T, S)

    def write(old, new):
        return old.at[jnp.arange(B)[:, None], at_BT].set(new, mode="drop")

    return state.replace(
        text_BS=write(state.text_BS, tokens_BT),
        logprob_BS=write(state.logprob_BS, logprob_R1.reshape(B, T)),
        top_ids_BSk=write(state.top_ids_BSk, top_ids_Rk.reshape(B, T, k)),
        top_BSk=write(state.top_BSk, top_Rk.reshape(B, T, k)),
    )
