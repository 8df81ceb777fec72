"""Adam's scaling (arXiv:1412.6980), whose slots are updated in place.

The sums are optax's, in its order. XLA:CPU computes a new slot again wherever it is read, so the
parameter's update would read the old slots after the new ones were written over them: XLA then
copies both, 8 bytes a parameter and as much time as the update itself. A barrier behind the slots
lets the parameter read the new ones (docs/speed.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gpt_jax.types import Array, Tree


class AdamState(optax.ScaleByAdamState):
    """optax's, of a transformation that leaves it as it was where `finite` is false."""


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """m / (sqrt(v) + eps), both without their bias.

    `update` takes `finite`, bool[]: if it is false the state stays as it was. It must be told here,
    as a choice that is made behind the barrier would need the old slots beside the new ones.
    """

    def init(params: Tree) -> AdamState:
        zeros = optax.tree.zeros_like
        return AdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(
        grads: Tree,
        state: AdamState,
        params: Tree = None,
        *,
        finite: Array | bool = True,
        **_: Any,
    ) -> tuple[Tree, AdamState]:
        del params

        def choose(new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        mu = choose(optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = choose(optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        mu, nu = lax.platform_dependent(
            mu, nu, cpu=_one_barrier_a_leaf, default=lambda mu, nu: (mu, nu)
        )
        count = optax.safe_increment(state.count)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, AdamState(choose(count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _one_barrier_a_leaf(mu: Tree, nu: Tree) -> tuple[Tree, Tree]:
    pairs = jax.tree.map(lambda m, v: lax.optimization_barrier((m, v)), mu, nu)
    return tuple(jax.tree.transpose(jax.tree.structure(mu), jax.tree.structure((0, 0)), pairs))
