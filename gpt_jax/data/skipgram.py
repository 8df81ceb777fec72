"""Skip-gram with negative sampling (arXiv:1310.4546) on a stream of tokens.

V entries in the vocabulary, D numbers a vector.  A step trains on R rows of T tokens behind one
another, with K tokens drawn against each row: every token of a row predicts those around it and
tells them from the K, which count as `negatives` a pair.  Sharing them makes a step three batched
products and a few thousand rows of the tables, where the paper's loop touches seven rows a pair.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.types import Array

_ROW = 64  # T: pairs over the border of two rows are left out, other ones each epoch
_DRAWN = 64  # K
_RATE = 0.1
_POWER = 0.75  # the paper's smoothing of frequencies when negatives are drawn


def train_skipgram(
    tokens: np.ndarray,
    vocab_size: int,
    dim: int,
    *,
    window: int = 5,
    negatives: int = 5,
    epochs: int = 5,
    seed: int = 0,
    batch: int = 64,
    subsample: float = 1e-3,
) -> np.ndarray:
    """Vectors in which tokens that stand in the same surroundings lie close.

    The same arguments give the same vectors on the same machine.  Tables and optimizer are f32.

    Args:
      tokens: int[n], a text; nothing marks borders of documents.
      vocab_size: V.
      dim: D.
      window: most places between a token and one that it predicts; each token draws its own from
        1 to this, so that near ones count more.
      negatives: weight of the drawn tokens against one true pair.
      epochs: times over the text.
      seed: of everything that is drawn.
      batch: rows a step (R).
      subsample: tokens of a larger share of the text are left out at random, keeping
        sqrt(subsample / share) of them.

    Returns:
      float32[V, D]; what the text lacks has zeros.

    Raises:
      ValueError: the text is shorter than two tokens.
    """
    tokens = np.asarray(tokens)
    if len(tokens) < 2:
        raise ValueError(f"init.word_vectors: {len(tokens)} tokens are no text to learn from")
    counts = np.bincount(tokens, minlength=vocab_size)
    assert len(counts) == vocab_size, "an id beyond the vocabulary"
    keep_V = np.minimum(1.0, np.sqrt(subsample * len(tokens) / np.maximum(counts, 1)))
    borders_V = np.cumsum(counts**_POWER)
    rng = np.random.default_rng(seed)
    state = _start(rng, vocab_size, dim)
    for _ in range(epochs):
        kept = tokens[rng.random(len(tokens)) < keep_V[tokens]]
        for rows_RT in _batches(kept if len(kept) > 1 else tokens, batch, rng):
            reach_RT = rng.integers(1, window + 1, rows_RT.shape, dtype=np.int32)
            draws = rng.random((batch, _DRAWN)) * borders_V[-1]
            drawn_RK = np.searchsorted(borders_V, draws, side="right").astype(np.int32)
            state = _step(state, rows_RT, reach_RT, drawn_RK, weight=negatives / _DRAWN)
    return np.where(counts[:, None] > 0, np.asarray(state[0]), np.float32(0))


def _start(rng, vocab_size: int, dim: int) -> tuple[Array, Array, Array, Array]:
    """The table that is wanted, that of predicted tokens, and how far each row has moved."""
    wanted_VD = rng.uniform(-0.5 / dim, 0.5 / dim, (vocab_size, dim)).astype(np.float32)
    moved_V = np.zeros(vocab_size, np.float32)
    start = (wanted_VD, np.zeros_like(wanted_VD), moved_V, moved_V)
    return tuple(jnp.array(array) for array in start)


def _batches(tokens: np.ndarray, batch: int, rng) -> list[np.ndarray]:
    """The text as rows in random order, int32[R, T] each; the last are filled from its start."""
    size = -(-len(tokens) // (batch * _ROW)) * batch * _ROW
    rows = np.resize(tokens, size).astype(np.int32).reshape(-1, _ROW)
    return list(rng.permutation(rows).reshape(-1, batch, _ROW))


@partial(jax.jit, donate_argnums=0)
def _step(state, tokens_RT: Array, reach_RT: Array, drawn_RK: Array, weight: float):
    wanted_VD, other_VD, wanted_moved_V, other_moved_V = state
    num_true = tokens_RT.size
    others = jnp.concatenate([tokens_RT.reshape(-1), drawn_RK.reshape(-1)])
    vectors = wanted_VD[tokens_RT.reshape(-1)], other_VD[others]

    def loss(center_ND, others_MD):
        center_RTD = center_ND.reshape(*tokens_RT.shape, -1)
        true_RTD = others_MD[:num_true].reshape(center_RTD.shape)
        drawn_RKD = others_MD[num_true:].reshape(*drawn_RK.shape, -1)
        return _loss(center_RTD, true_RTD, drawn_RKD, reach_RT, weight)

    center_grads, other_grads = jax.grad(loss, argnums=(0, 1))(*vectors)
    wanted = _adagrad(wanted_VD, wanted_moved_V, tokens_RT.reshape(-1), center_grads)
    other = _adagrad(other_VD, other_moved_V, others, other_grads)
    return wanted[0], other[0], wanted[1], other[1]


def _loss(center_RTD, true_RTD, drawn_RKD, reach_RT, weight) -> Array:
    """Sum over pairs of equation 4 of the paper, negated."""
    places = jnp.arange(center_RTD.shape[1])
    distance_TT = jnp.abs(places[:, None] - places[None, :])
    pair_RTT = (distance_TT > 0) & (distance_TT <= reach_RT[:, :, None])
    true_RTT = jnp.einsum("rtd,rsd->rts", center_RTD, true_RTD)
    drawn_RTK = jnp.einsum("rtd,rkd->rtk", center_RTD, drawn_RKD)
    pairs_RT = pair_RTT.sum(-1)
    return jnp.sum(jnp.where(pair_RTT, jax.nn.softplus(-true_RTT), 0.0)) + weight * jnp.sum(
        jax.nn.softplus(drawn_RTK) * pairs_RT[:, :, None]
    )


def _adagrad(table_VD, moved_V, ids_N, grads_ND):
    """AdaGrad with one rate a row: a token moves by the sum of what its places in a batch say.

    Plain sums would let frequent tokens run away, plain means would leave rare ones where they are.
    """
    ids_U, place_N = jnp.unique(ids_N, return_inverse=True, size=len(ids_N), fill_value=-1)
    sums_UD = jax.ops.segment_sum(grads_ND, place_N, num_segments=len(ids_N))
    ids_U = jnp.where(ids_U < 0, len(table_VD), ids_U)  # beyond the end: dropped
    moved_V = moved_V.at[ids_U].add(jnp.mean(sums_UD**2, -1), mode="drop")
    scale_U = jax.lax.rsqrt(moved_V.at[ids_U].get(mode="fill", fill_value=1.0) + 1e-12)
    return table_VD.at[ids_U].add(-_RATE * scale_U[:, None] * sums_UD, mode="drop"), moved_V
