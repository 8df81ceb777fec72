"""Which drafted tokens a model keeps, so that its text is distributed as without them.

arXiv:2211.17192 and arXiv:2302.01318. B rows, K drafted tokens, T = K + 1 places, V vocabulary; p
are the probabilities of the model whose text it is, q those that the drafts were drawn with. Both
are after temperature and every other rule.
"""

import jax
import jax.numpy as jnp

from gpt_jax.types import Array


def accept_probability(p_BKV: Array, q_BKV: Array, drafted_BK: Array) -> Array:
    """min(1, p(d) / q(d)) of each drafted token d, [B, K]; 0 where the model never writes it."""
    p_BK, q_BK = (
        jnp.take_along_axis(x, drafted_BK[..., None], axis=-1)[..., 0] for x in (p_BKV, q_BKV)
    )
    return jnp.minimum(1.0, p_BK / jnp.maximum(q_BK, jnp.finfo(q_BK.dtype).tiny))


def residual(p_BV: Array, q_BV: Array) -> Array:
    """max(0, p - q), normalised: where the token comes from that replaces a rejected one.

    Where q is 0 it is p. Where rounding leaves nothing it is p too.
    """
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = left_BV.sum(-1, keepdims=True)
    return jnp.where(total_B1 > 0, left_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


def accept(
    p_BTV: Array, q_BKV: Array, drafted_BK: Array, num_drafted_B: Array, keys_B: Array
) -> tuple[Array, Array]:
    """Keeps the first drafted tokens of each row and adds one of the model's own.

    Args:
      p_BTV: The model's probabilities at each drafted token's place and behind the last.
      q_BKV: The drafts'; one-hot where they were not drawn.
      drafted_BK: int32.
      num_drafted_B: int32; how many of the K are drafts.
      keys_B: A random key a row, used for nothing else.

    Returns:
      int32[B, T] tokens, of which a row's first accepted_B + 1 count; int32[B] accepted_B.
    """
    K = drafted_BK.shape[1]
    keys_B2 = jax.vmap(jax.random.split)(keys_B)
    uniform_BK = jax.vmap(lambda key: jax.random.uniform(key, (K,)))(keys_B2[:, 0])
    is_draft_BK = jnp.arange(K) < num_drafted_B[:, None]
    # Uniform numbers reach 0 but not 1: what never comes is never kept, what always comes always.
    kept_BK = is_draft_BK & (uniform_BK < accept_probability(p_BTV[:, :K], q_BKV, drafted_BK))
    accepted_B = jnp.cumprod(kept_BK, axis=1).sum(1, dtype=jnp.int32)

    # Behind the last draft nothing was proposed: with q = 0 the residual is p.
    q_BKV = jnp.where(is_draft_BK[..., None], q_BKV, 0.0)
    q_BTV = jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0)))
    p_BV, q_BV = (
        jnp.take_along_axis(x, accepted_B[:, None, None], axis=1)[:, 0] for x in (p_BTV, q_BTV)
    )
    last_B = jax.vmap(jax.random.categorical)(keys_B2[:, 1], jnp.log(residual(p_BV, q_BV)))
    return _followed(drafted_BK, accepted_B, last_B), accepted_B


def accept_greedy(best_BT: Array, drafted_BK: Array, num_drafted_B: Array) -> tuple[Array, Array]:
    """`accept` at temperature 0: the drafts that are what the model writes anyway.

    Args:
      best_BT: int32; the model's choice at each place.
      drafted_BK, num_drafted_B: As for `accept`.
    """
    K = drafted_BK.shape[1]
    kept_BK = (drafted_BK == best_BT[:, :K]) & (jnp.arange(K) < num_drafted_B[:, None])
    return best_BT, jnp.cumprod(kept_BK, axis=1).sum(1, dtype=jnp.int32)


def _followed(drafted_BK: Array, accepted_B: Array, last_B: Array) -> Array:
    """The drafts with a token of its own in place accepted_B of each row, int32[B, T]."""
    tokens_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
    place_T = jnp.arange(tokens_BT.shape[1])
    return jnp.where(place_T == accepted_B[:, None], last_B[:, None], tokens_BT).astype(jnp.int32)


def look_up(
    text_BS: Array, length_B: Array, num_draft: int, ngrams: tuple[int, ...] = (3, 2, 1)
) -> tuple[Array, Array]:
    """What followed where the text's last tokens stood before: a draft without a model.

    Of the places with the longest n-gram in common one with the most tokens behind it is taken,
    and of these the last.

    Args:
      text_BS: int32 ids.
      length_B: int32; how many of them a row has.
      num_draft: K.
      ngrams: How many last tokens to look for, first those that are tried first.

    Returns:
      int32[B, K] drafted tokens; int32[B] how many there are.
    """
    B, S = text_BS.shape
    place_S = jnp.arange(S)
    start_B = jnp.zeros(B, jnp.int32)  # of what followed
    found_B = jnp.zeros(B, bool)
    for n in ngrams:
        # A place s stands for what begins there, behind n tokens that are the text's last n.
        same_BS = (place_S >= n) & (place_S < length_B[:, None])
        for back in range(1, n + 1):
            tail_B1 = jnp.take_along_axis(text_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
            same_BS &= jnp.roll(text_BS, back, axis=1) == tail_B1
        behind_BS = jnp.minimum(length_B[:, None] - place_S, num_draft)
        best_B = jnp.argmax(jnp.where(same_BS, behind_BS * S + place_S, -1), axis=1)
        here_B = same_BS.any(1) & ~found_B
        start_B = jnp.where(here_B, best_B.astype(jnp.int32), start_B)
        found_B |= here_B
    index_BK = jnp.minimum(start_B[:, None] + jnp.arange(num_draft), S - 1)
    drafted_BK = jnp.take_along_axis(text_BS, index_BK, axis=1)
    return drafted_BK, jnp.where(found_B, jnp.minimum(length_B - start_B, num_draft), 0)
