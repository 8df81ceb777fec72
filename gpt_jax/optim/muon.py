"""Muon: momentum whose matrices are orthogonalised; what is no matrix is left to Adam.

Keller Jordan's Muon (kellerjordan.github.io/posts/muon; arXiv:2502.16982), with the state of
optax's, so that checkpoints of both are the same. How the matrices meet is ours: optax writes
5 iterations out for every parameter, which on CPU is a quarter of what a step's compilation takes
and slow as batches of one (docs/speed.md).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax import contrib

from gpt_jax import trees
from gpt_jax.types import Array, Tree

# Of the quintic, as Muon has them: they push small singular values up fast and end near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Numbers of a batch of matrices, where batches are fast: a device may need whole ones of what lies
# in shards, and 48 layers' worth of a large model's is more than it has.
_AT_ONCE = 1 << 28

Axes = Callable[[str], tuple[tuple[int, ...], tuple[int, ...]] | None]
Rate = Callable[[Array | int], Array]


def muon(
    rate: Rate,
    adam_rate: Rate,
    axes: Axes,
    *,
    beta: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay_mask: Callable[[Tree], Tree] | None,
) -> optax.GradientTransformation:
    """Muon for what `axes` names, Adam (with Nesterov's momentum, without decay) for the rest.

    Args:
      rate: Of Muon, by step.
      adam_rate: Of Adam, by step.
      axes: From a parameter's name to its axes that are rows and those that are columns, the last
        ones, counted from the end; None: it is Adam's. Axes ahead of them count matrices.
      beta: Muon's momentum.
      b1: Adam's.
      b2: Adam's, of the squares.
      eps: Of both.
      weight_decay: Muon's, times the rate.
      decay_mask: From parameters to those that decay; None: all.
    """

    def labels(params: Tree) -> Tree:
        return trees.map_named(lambda name, _: "muon" if axes(name) else "adam", params)

    return optax.partition(
        {
            "muon": optax.chain(
                _scale_by_muon(axes, beta, eps),
                _scale_by_shape(axes),
                optax.add_decayed_weights(weight_decay, decay_mask),
                optax.scale_by_learning_rate(rate),
            ),
            "adam": optax.adamw(adam_rate, b1=b1, b2=b2, eps=eps, weight_decay=0.0, nesterov=True),
        },
        labels,
    )


def _scale_by_muon(axes: Axes, beta: float, eps: float) -> optax.GradientTransformation:
    def init(params: Tree) -> contrib.MuonState:
        return contrib.MuonState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params),
            ns_coeffs=jnp.asarray(_COEFFICIENTS),
        )

    def update(grads: Tree, state: contrib.MuonState, params: Tree = None):
        del params
        mu = optax.tree.update_moment(grads, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(grads, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        updates = _orthogonalized(momentum, axes, state.ns_coeffs, eps)
        return updates, contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _scale_by_shape(axes: Axes) -> optax.GradientTransformation:
    """sqrt(max(1, columns / rows)): what a product adds to its outputs is then of one size."""

    def scale(name: str, x: Array) -> Array:
        rows, columns = _matrix_shape(x, axes(name))
        return math.sqrt(max(1, columns / rows)) * x

    return optax.stateless(lambda updates, _: trees.map_named(scale, updates))


def _matrix_shape(x: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int]:
    rows, columns = (math.prod(x.shape[axis] for axis in part) for part in axes)
    return rows, columns


def _orthogonalized(tree: Tree, axes: Axes, coefficients: Array, eps: float) -> Tree:
    """Each matrix by its nearest of singular values near 1."""
    names = trees.map_named(lambda name, _: name, tree)
    leaves, structure = jax.tree.flatten(tree)
    shapes = [
        _matrix_shape(x, axes(name)) for name, x in zip(jax.tree.leaves(names), leaves, strict=True)
    ]
    matrices = []  # [number, rows, columns] each, no more rows than columns
    for (rows, columns), x in zip(shapes, leaves, strict=True):
        x = x.reshape(-1, rows, columns)
        matrices.append(x if rows <= columns else x.swapaxes(1, 2))
    iterate = functools.partial(_newton_schulz, coefficients=coefficients, eps=eps)
    matrices = lax.platform_dependent(
        matrices,
        cpu=functools.partial(_one_after_another, iterate),
        default=lambda leaves: [_in_batches(iterate, x) for x in leaves],
    )
    back: list[Any] = []
    for (rows, columns), x, matrix in zip(shapes, leaves, matrices, strict=True):
        matrix = matrix if rows <= columns else matrix.swapaxes(1, 2)
        back.append(matrix.reshape(x.shape))
    return jax.tree.unflatten(structure, back)


def _in_batches(iterate: Callable[[Array], Array], x_LMN: Array) -> Array:
    at_once = max(1, _AT_ONCE // math.prod(x_LMN.shape[1:]))
    if at_once >= len(x_LMN):
        return jax.vmap(iterate)(x_LMN)
    return lax.map(iterate, x_LMN, batch_size=at_once)


def _one_after_another(iterate: Callable[[Array], Array], matrices: list[Array]) -> list[Array]:
    """One loop a shape: XLA:CPU is faster at single products than at batches of them."""
    found: list[Any] = [None] * len(matrices)
    for shape in dict.fromkeys(x.shape[1:] for x in matrices):
        group = [i for i, x in enumerate(matrices) if x.shape[1:] == shape]
        done = lax.map(iterate, jnp.concatenate([matrices[i] for i in group]))
        begin = 0
        for i in group:
            found[i] = lax.slice_in_dim(done, begin, begin + len(matrices[i]))
            begin += len(matrices[i])
    return found


@jax.jit  # traced once a shape
def _newton_schulz(x_MN: Array, *, coefficients: Array, eps: float) -> Array:
    """Five times x <- c0 x + (c1 A + c2 A A) x, A = x x^T, after a division by the norm."""

    def iteration(_, x):
        square = x @ x.T
        return (
            coefficients[0] * x + (coefficients[1] * square + coefficients[2] * square @ square) @ x
        )

    return lax.fori_loop(0, _ITERATIONS, iteration, x_MN / (jnp.linalg.norm(x_MN) + eps))
