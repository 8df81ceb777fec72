"""What changes or forbids logits before a token is drawn, and the log-probabilities to report.

B rows, V vocabulary, S places of a row's history. The values are arrays, one a row, so that
changing them compiles nothing. The order in which `decode` applies the rules is that of
`SamplingParams`: penalize, forbid_ngrams, forbid (before min_tokens), constrain.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt_jax.types import Array

# The longest n-gram that forbid_ngrams compares.
MAX_NGRAM = 16


@flax.struct.dataclass
class Penalties:
    """How each row's earlier tokens weigh on its next one.

    Attributes:
      repetition_B: f32; divides the positive logits of tokens that the row holds and multiplies the
        negative ones, once for a token however often it occurs (arXiv:1909.05858); 1: none.
      presence_B: f32; subtracted from the logits of tokens that were generated; 0: none.
      frequency_B: f32; subtracted from them once for each time; 0: none.
      ngram_B: int32; so many tokens in a row may not occur twice, at most MAX_NGRAM; 0: they may.
      min_length_B: int32; so many tokens are generated before one that ends the text.
    """

    repetition_B: Array
    presence_B: Array
    frequency_B: Array
    ngram_B: Array
    min_length_B: Array


def penalize(
    logits_BV: Array, penalties: Penalties, *, counts_BV: Array, in_prompt_BV: Array
) -> Array:
    """The logits after repetition, then frequency and presence penalties, f32[B, V].

    Args:
      logits_BV: Raw logits; -inf stays.
      penalties: A row's values.
      counts_BV: int32; how often each token was generated in the row.
      in_prompt_BV: bool; the tokens that the prompt holds: only repetition counts them.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    generated_BV = counts_BV > 0
    logits_BV = penalize_seen(
        logits_BV, in_prompt_BV | generated_BV, penalties.repetition_B[:, None]
    )  # fmt: skip
    return (
        logits_BV
        - penalties.frequency_B[:, None] * counts_BV
        - penalties.presence_B[:, None] * generated_BV
    )


def penalize_seen(logits_BV: Array, seen_BV: Array, repetition: Array | float) -> Array:
    """The logits with the repetition penalty, f32[B, 1] or one for all, on seen tokens."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def forbid_ngrams(logits_BV: Array, history_BS: Array, length_B: Array, ngram_B: Array) -> Array:
    """The logits with -inf where a token would complete an n-gram that the row holds already.

    Args:
      logits_BV: Logits of the token at place length_B.
      history_BS: int32 ids of prompt and generated text, padded on the right with anything.
      length_B: int32; how many of them a row has.
      ngram_B: int32; n of each row, at most MAX_NGRAM; 0 forbids nothing.
    """
    B, S = history_BS.shape
    place_S = jnp.arange(S)
    # A place where an n-gram ends that begins as the row's last n - 1 tokens.
    matches_BS = (place_S < length_B[:, None]) & (place_S >= ngram_B[:, None] - 1)
    matches_BS &= (ngram_B > 0)[:, None]

    def compare(back, matches_BS):
        last_B1 = jnp.take_along_axis(history_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        # What the roll brings round from the end stands before place n - 1.
        same_BS = jnp.roll(history_BS, back, axis=1) == last_B1
        return matches_BS & (same_BS | (back >= ngram_B)[:, None])

    longest = jnp.minimum(ngram_B.max(), MAX_NGRAM)
    matches_BS = jax.lax.fori_loop(1, longest, compare, matches_BS)
    return forbid(logits_BV, jnp.where(matches_BS, history_BS, -1), jnp.ones(B, bool))


def forbid(logits_BV: Array, ids: Array, where_B: Array) -> Array:
    """The logits with -inf at some ids of some rows.

    Args:
      logits_BV: Logits.
      ids: int32[N] for all rows or int32[B, N]; negative ones stand for no token.
      where_B: bool; the rows that are changed.
    """
    B, V = logits_BV.shape
    ids_BN = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (B, jnp.shape(ids)[-1]))
    # Out of range is dropped, but a negative index would count from the end.
    ids_BN = jnp.where((ids_BN >= 0) & where_B[:, None], ids_BN, V)
    return logits_BV.at[jnp.arange(B)[:, None], ids_BN].set(-jnp.inf, mode="drop")


def constrain(logits_BV: Array, allowed_BV: Array, raw_BV: Array) -> Array:
    """The logits with -inf outside of what is allowed, never of a whole row.

    Where the other rules forbid all that is allowed (an n-gram that a schema demands twice, an end
    before min_tokens), the constraint wins: its tokens get their raw logits back.

    Args:
      logits_BV: Logits after the other rules.
      allowed_BV: bool, broadcast to them; at least one token a row.
      raw_BV: Logits before the other rules.
    """
    left_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    nothing_B1 = (left_BV == -jnp.inf).all(-1, keepdims=True)
    return jnp.where(nothing_B1 & allowed_BV, raw_BV, left_BV)


def logprobs_of(logits_BV: Array, ids_BN: Array) -> Array:
    """Log-probabilities of some ids of each row under its softmax, f32[B, N]."""
    logits_BV = logits_BV.astype(jnp.float32)
    chosen_BN = jnp.take_along_axis(logits_BV, ids_BN, axis=-1)
    return chosen_BN - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def top_logprobs(logits_BV: Array, k: int) -> tuple[Array, Array]:
    """The k most likely ids of each row and their log-probabilities, the likeliest first.

    For a token that is among them logprobs_of gives the same float.

    Args:
      logits_BV: Raw logits, before any rule.
      k: Static; at most V are given.

    Returns:
      int32[B, k] ids and f32[B, k] log-probabilities.
    """
    _, ids_Bk = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
    return ids_Bk, logprobs_of(logits_BV, ids_Bk)
