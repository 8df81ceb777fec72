"""Products of a few rows and many weights on CPU, as decoding has them: written as sums.

XLA:CPU's library computes such products more slowly than it could read the weights, or not at all
in their own dtype; loops that LLVM makes of sums do better, if they have the right form
(docs/speed.md). M rows, K inputs, F outputs; all results are f32.
"""

import jax.numpy as jnp
from jax import lax

from gpt_jax.types import Array


def computed_once(x: Array) -> Array:
    """x, f32. Or XLA:CPU would fuse what computes x into what reads it, and repeat it there.

    It fuses no sum into anything; one over what is not there costs nothing.
    """
    return lax.reduce(jnp.stack([x.astype(jnp.float32), jnp.zeros(x.shape)]), 0.0, lax.add, (0,))


def by_sums(x_MK: Array, w_FK: Array) -> Array:
    """f32[M, F] of weights of any dtype.

    XLA:CPU makes one product of it, which reads w once, in its own dtype.
    """
    return (w_FK[:, None].astype(jnp.float32) * x_MK.astype(jnp.float32)).sum(-1).T


# XLA:CPU unrolls a sum of at most so many terms of one part and of two parts of the weights, and
# only then computes lanes in vectors.
_MAX_TERMS = {1: 24, 2: 18}
# Two vector registers: a loop over one alone is not computed in vectors.
_LANES = 16


def one_or_two_rows(x_MK: Array, w_FK: Array) -> Array:
    """f32[M, F]: each output as `lanes` sums of few terms, then their sum.

    Two such sums go side by side, of both rows or of two halves of the only one: a reduction of
    more than one operand stays a loop of its own, in which a weight is read, converted and used in
    registers. Written as one sum it goes to a library that computes more slowly than it reads.
    """
    M, K = x_MK.shape
    halves = 2 // M
    lanes = _lanes(K, halves)
    if not lanes:
        return by_sums(jnp.repeat(x_MK, halves, 0), w_FK)[:M]
    shape = (K // (halves * lanes), halves, lanes)
    w = w_FK.reshape(-1, *shape).astype(jnp.float32)
    x = x_MK.astype(jnp.float32).reshape(M, *shape)
    terms = [w[:, :, h] * x[m, :, h] for m in range(M) for h in range(halves)]
    zeros = [jnp.float32(0)] * 2
    first, second = lax.reduce(terms, zeros, lambda a, b: [a[0] + b[0], a[1] + b[1]], (1,))
    if M == 1:
        return (first + second).sum(-1)[None]
    return jnp.stack([first.sum(-1), second.sum(-1)])


def _lanes(K: int, halves: int) -> int:
    """The fewest lanes that leave few enough terms; 0: K cannot be split so."""
    for lanes in range(_LANES, K // halves + 1, _LANES):
        terms, rest = divmod(K, halves * lanes)
        if not rest and terms <= _MAX_TERMS[halves]:
            return lanes
    return 0


# Rows of weights that are summed at once, in one register of outputs beside the other.
_ROWS_OF_A_SUM = (16, 12, 9, 8, 6, 4)


def one_row(x_1K: Array, w_KF: Array) -> Array:
    """f32[1, F] by sums over blocks of rows, two of which go side by side (`one_or_two_rows`)."""
    K = len(w_KF)
    size = next((size for size in _ROWS_OF_A_SUM if K % (2 * size) == 0), None)
    if size is None:
        return jnp.dot(x_1K, w_KF.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    w = w_KF.reshape(2, -1, size, w_KF.shape[1]).astype(jnp.float32)
    x = x_1K.astype(jnp.float32).reshape(2, -1, size, 1)
    zeros = [jnp.float32(0)] * 2
    first, second = lax.reduce(list(w * x), zeros, lambda a, b: [a[0] + b[0], a[1] + b[1]], (1,))
    return (first + second).sum(0)[None]
