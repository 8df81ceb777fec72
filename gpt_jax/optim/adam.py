"""Adam's scaling (arXiv:1412.6980), whose slots are updated in place.

The sums are optax's, in its order. What differs is where the state is kept back if the gradient is
not finite: here, before the update reads it. If the step does that afterwards, the update is made
of slots that are not the final ones; XLA:CPU then computes them again from the old ones, and copies
both slots of every parameter so as not to write over what it still reads (docs/speed.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax.types import Array, Tree


class AdamState(optax.ScaleByAdamState):
    """optax's, of a transformation that leaves it as it was where `finite` is false."""


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """m / (sqrt(v) + eps), both without their bias.

    `update` takes `finite`, bool[]: if it is false the state stays as it was.
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
        count = optax.safe_increment(state.count)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, AdamState(choose(count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
