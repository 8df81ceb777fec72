"""The two compiled programs of decoding: fill a cache with prompts, and take steps from it.

B rows, T prompt tokens, S cache length, N steps, V vocabulary. All but the last token of a prompt
goes into the cache at once; the last one is the first step's input. So a prompt's logits, of which
only the last would be used, are never computed, and tokens are drawn in one place.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.models.layers import LayerCache
from gpt_jax.models.transformer import Cache, Transformer, make_cache
from gpt_jax.ops import sampling
from gpt_jax.types import Array, Tree


@flax.struct.dataclass
class DecodeState:
    """Rows under way.

    Attributes:
      cache: Keys and values of all tokens of a row but its last.
      token_B: int32; the last token of each row.
      done_B: bool; rows that take no more tokens.
    """

    cache: Cache
    token_B: Array
    done_B: Array


@flax.struct.dataclass
class RowParams:
    """What is fixed for a row.

    Attributes:
      rules: How its tokens are drawn.
      keys_B: Its base key; a token's key is folded in with the token's position.
      end_B: int32; its length, prompt included, at which it is done.
    """

    rules: sampling.Rules
    keys_B: Array
    end_B: Array


def row_keys(seeds_B: Array, samples_B: Array) -> Array:
    """Base keys from uint32 seeds and sample numbers: nothing of the batch goes into them."""
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds_B, samples_B)


# No query has a rank as high: a key that nobody sees.
_UNSEEN = 2**30


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
    model: Transformer,
    params: Tree,
    tokens_BT: Array,
    lengths_B: Array,
    source_BS: Array | None = None,
    source_lengths_B: Array | None = None,
) -> Cache:
    """A cache of T places that holds tokens_BT, right-padded prompts.

    Its index is T in every row: who knows the true lengths sets it, and what stands behind them
    is not seen and overwritten.

    Args:
      model: The Transformer.
      params: Its parameters.
      tokens_BT: int32 ids.
      lengths_B: Tokens of each prompt; the rest is padding.
      source_BS: An encoder's right-padded input.
      source_lengths_B: Tokens of each of these.
    """
    B, T = tokens_BT.shape
    cache = make_cache(model.config, B, T, model.config.dtype)
    inputs = {}
    if model.config.read_prompts_whole:
        inside = jnp.arange(T) < lengths_B[:, None]
        inputs["key_ranks"] = jnp.where(inside, 0, _UNSEEN)
        inputs["query_ranks"] = jnp.zeros((B, T), jnp.int32)
    if source_BS is not None:
        inside = jnp.arange(source_BS.shape[1]) < source_lengths_B[:, None]
        inputs["encoder_tokens"] = source_BS
        inputs["encoder_segment_ids"] = inside.astype(jnp.int32)
    return model.apply({"params": params}, tokens_BT, cache=cache, features=True, **inputs)[1]


@functools.partial(jax.jit, static_argnames=("length",))
def spread(cache: Cache, rows_B: Array, lengths_B: Array, *, length: int) -> Cache:
    """A cache of `length` places whose row b holds the first lengths_B[b] tokens of rows_B[b].

    A prompt that is to be continued several times is prefilled once and copied.
    """

    def take(old: Array | None) -> Array | None:
        # [B, S, K, H], or [L, B, S, K, H] with stacked layers.
        return None if old is None else jnp.take(old, rows_B, axis=old.ndim - 4)

    def longer(old: Array) -> Array:
        missing = length - old.shape[-3]
        return jnp.pad(old, [(0, 0)] * (old.ndim - 3) + [(0, missing), (0, 0), (0, 0)])

    def layer(old: LayerCache) -> LayerCache:
        own = longer(take(old.k_BSKH)), longer(take(old.v_BSKH))
        return LayerCache(*own, take(old.memory_k_BSKH), take(old.memory_v_BSKH))

    layers = jax.tree.map(layer, cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    segments = cache.memory_segments_BS
    return Cache(layers, lengths_B, None if segments is None else segments[rows_B])


@functools.partial(
    jax.jit,
    static_argnames=("model", "kind", "vocab_size", "max_steps"),
    donate_argnames=("state",),
)
def decode(
    model: Transformer,
    params: Tree,
    state: DecodeState,
    rows: RowParams,
    stopped_B: Array,
    num_steps: Array | int,
    *,
    eos_id: Array | int,
    kind: str,
    vocab_size: int,
    max_steps: int,
) -> tuple[DecodeState, Array, Array, Array]:
    """Up to num_steps tokens for each row; ends early when all rows are done.

    Args:
      model: The Transformer.
      params: Its parameters.
      state: Donated.
      rows: What is fixed for each row.
      stopped_B: bool; rows that the caller ended since the last call.
      num_steps: At most max_steps; an array, so that another number compiles nothing.
      eos_id: The token that ends a row; -1: none.
      kind: One of sampling.KINDS that is enough for rows.rules.
      vocab_size: Ids from here on are never drawn.
      max_steps: N.

    Returns:
      The state after; int32[B, N] tokens; f32[B, N] their log-probabilities under the model's own
      softmax, before any rule; int32[B]: how many of the N are the row's.
    """
    B = state.token_B.shape[0]
    state = state.replace(done_B=state.done_B | stopped_B)

    def body(carry):
        i, state, tokens_BN, logprobs_BN, count_B = carry
        open_B = ~state.done_B
        state, logprob_B = _step(model, params, state, rows, eos_id, kind, vocab_size)
        tokens_BN = tokens_BN.at[:, i].set(state.token_B)
        logprobs_BN = logprobs_BN.at[:, i].set(logprob_B)
        return i + 1, state, tokens_BN, logprobs_BN, count_B + open_B

    def unfinished(carry):
        return (carry[0] < num_steps) & ~carry[1].done_B.all()

    buffers = jnp.zeros((B, max_steps), jnp.int32), jnp.zeros((B, max_steps), jnp.float32)
    start = (jnp.int32(0), state, *buffers, jnp.zeros(B, jnp.int32))
    return jax.lax.while_loop(unfinished, body, start)[1:]


def _step(model, params, state: DecodeState, rows: RowParams, eos_id, kind, vocab_size):
    """One token more in each row that is not done; its log-probability, f32[B]."""
    logits_B1V, cache = model.apply({"params": params}, state.token_B[:, None], cache=state.cache)
    logits_BV = logits_B1V[:, 0]
    # A finished row stays where it is: its index would run out of the cache.
    index_B = jnp.where(state.done_B, state.cache.index_B, cache.index_B)
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, index_B)
    allowed_BV = sampling.forbid_from(logits_BV, vocab_size)
    drawn_B = sampling.draw(allowed_BV, keys_B, rows.rules, kind=kind)
    token_B = jnp.where(state.done_B, state.token_B, drawn_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    done_B = state.done_B | (token_B == eos_id) | (index_B + 1 >= rows.end_B)
    return DecodeState(cache.replace(index_B=index_B), token_B, done_B), logprob_B
