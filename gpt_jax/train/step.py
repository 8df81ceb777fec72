"""The training step: a pure function that the caller jits and shards."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax import trees
from gpt_jax.models.transformer import forward
from gpt_jax.objectives.objectives import Objective
from gpt_jax.optim.adam import AdamState
from gpt_jax.parallel.sharding import constrain
from gpt_jax.runs.state import Fixed, TrainState
from gpt_jax.types import Array, Batch, Tree


def _microbatches(batch: Batch, number: int) -> Batch:
    """[B, ...] -> [number, B / number, ...].

    Microbatch m takes the rows m, m + number, ...: each device splits the rows it holds, and
    nothing moves between devices.
    """

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // number, number, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, dict(batch))


def train_step(
    state: TrainState,
    batch: Batch,
    fixed: Fixed | None = None,
    *,
    model: Any,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    teacher: Any = None,
    num_microbatches: int = 1,
    dropout: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One update.

    Args:
      state: The state before.
      batch: Global batch; `loss_mask` weighs its targets.
      fixed: Parameters that are read and not trained; None: there are none.
      model: Its `apply` gives the outputs.
      objective: What to minimise.
      optimizer: The optax transformation whose slots the state holds.
      teacher: The model of fixed.teacher; its outputs become the batch's `teacher_logits`.
      num_microbatches: The gradient is accumulated over this many parts of the batch.
      dropout: Whether the model is run with dropout.

    Returns:
      The state after, and metrics: the objective's means over the batch, `grad_norm` before
      clipping, `num_targets`, and the state's flags. If the loss or the gradient is not finite,
      parameters and optimizer state are those of before and flags.first_nonfinite holds the step.
    """
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # The divisor is the whole batch's: microbatches with unequal masks are weighed as one batch.
    num_targets = objective.count(batch)
    divisor = jnp.maximum(num_targets, 1.0)
    fixed = fixed or Fixed()

    def loss_fn(params: Tree, microbatch: Batch, number: Array | int):
        # The gradient is that of the trained parameters alone: what is frozen costs no product.
        params = params if fixed.frozen is None else trees.merge(params, fixed.frozen)
        key = jax.random.fold_in(step_key, number) if dropout else None
        if teacher is not None:
            logits = forward(teacher, fixed.teacher, microbatch)
            microbatch = {**microbatch, "teacher_logits": jax.lax.stop_gradient(logits)}
        total, sums = objective.loss(forward(model, params, microbatch, key), microbatch)
        return total / divisor, jax.tree.map(lambda x: x / divisor, sums)

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        grads, means = grad_fn(state.params, batch, 0)
    else:

        def accumulate(carry, xs):
            number, microbatch = xs
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, microbatch, number)), None

        parts = _microbatches(batch, num_microbatches)
        part = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, state.params, part, 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, means), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(num_microbatches), parts))

    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(means["loss"])
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, finite=finite)
    params = optax.apply_updates(state.params, updates)

    def keep(new: Tree, old: Tree) -> Tree:
        def one(n: Any, o: Any) -> Any:  # an AdamState has seen to it itself
            return n if isinstance(n, AdamState) else jnp.where(finite, n, o)

        return jax.tree.map(one, new, old, is_leaf=lambda x: isinstance(x, AdamState))

    first_nonfinite = state.flags["first_nonfinite"]
    new_state = TrainState(
        step=state.step + 1,
        index=state.index + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        rng=state.rng,
        flags={
            "first_nonfinite": jnp.where(
                finite | (first_nonfinite >= 0), first_nonfinite, state.step
            )
        },
    )
    metrics = {**means, "grad_norm": grad_norm, "num_targets": num_targets}
    return new_state, {**metrics, **new_state.flags}
