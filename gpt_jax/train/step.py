"""The training step: a pure function that the caller jits and shards."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax import trees
from gpt_jax.models.transformer import forward, forward_training
from gpt_jax.objectives.objectives import Objective
from gpt_jax.optim.adam import AdamState
from gpt_jax.parallel.sharding import constrain
from gpt_jax.runs.state import NUM_LOSSES, Fixed, TrainState
from gpt_jax.types import Array, Batch, Tree

MOST_SKIPPED = 10  # updates in a row that are left out before the run stops


def _microbatches(batch: Batch, number: int) -> Batch:
    """[B, ...] -> [number, B / number, ...].

    Microbatch m takes the rows m, m + number, ...: each device splits the rows it holds, and
    nothing moves between devices.
    """

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // number, number, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, *(None, "batch", "length", *(None,) * x.ndim)[: x.ndim])

    return jax.tree.map(split, dict(batch))


def key_of_step(state: TrainState) -> Array:
    """The base of the next step's dropout keys."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)


def gradients(
    params: Tree,
    batch: Batch,
    fixed: Fixed,
    step_key: Array,
    *,
    model: Any,
    objective: Objective,
    teacher: Any = None,
    num_microbatches: int = 1,
    dropout: bool = False,
) -> tuple[Tree, dict[str, Array], Array]:
    """The gradient of what is minimised, for the trained parameters.

    Args:
      params: The trained parameters.
      step_key: Base of the dropout's keys.
      batch, fixed, model, objective, teacher, num_microbatches, dropout: See train_step.

    Returns:
      The gradient, the objective's means over the batch, and the number of its targets.
    """
    # The divisor is the whole batch's: microbatches with unequal masks are weighed as one batch.
    num_targets = objective.count(batch)
    divisor = jnp.maximum(num_targets, 1.0)
    # What routers lose is a mean over tokens, of every microbatch too.
    num_tokens = jnp.maximum((batch["segment_ids"] > 0).sum(), 1)

    def loss_fn(params: Tree, microbatch: Batch, number: Array | int):
        # The gradient is that of the trained parameters alone: what is frozen costs no product.
        params = params if fixed.frozen is None else trees.merge(params, fixed.frozen)
        key = jax.random.fold_in(step_key, number) if dropout else None
        if teacher is not None:
            logits = forward(teacher, fixed.teacher, microbatch)
            microbatch = {**microbatch, "teacher_logits": jax.lax.stop_gradient(logits)}
        outputs, router = forward_training(model, params, microbatch, key)
        total, sums = objective.loss(outputs, microbatch)
        loss, means = total / divisor, jax.tree.map(lambda x: x / divisor, sums)
        if router:
            router = {name: x / num_tokens for name, x in router.items()}
            loss += model.config.expert_balance * router["balance"]
            loss += model.config.router_z_loss * router["z"]
            means |= {f"router_{name}": x for name, x in router.items()}
        return loss, means

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        grads, means = grad_fn(params, batch, 0)
    else:

        def accumulate(carry, xs):
            number, microbatch = xs
            return jax.tree.map(jnp.add, carry, grad_fn(params, microbatch, number)), None

        parts = _microbatches(batch, num_microbatches)
        part = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, params, part, 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, means), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(num_microbatches), parts))
    return grads, means, num_targets


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
    most_skipped: int = 0,
    spike_sigma: float = 0.0,
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
      most_skipped: Updates in a row that may be left out without the run having to stop.
      spike_sigma: A loss so many standard deviations above the mean of the last ones is treated
        like one that is not finite; 0: none is.

    Returns:
      The state after, and metrics: the objective's means over the batch, `grad_norm` before
      clipping, `num_targets`, and flags that are numbers. If the loss or the gradient is not
      finite, parameters and optimizer state are those of before, to the bit, and it is counted;
      if that is once too often, flags.first_nonfinite holds the step.
    """
    grads, means, num_targets = gradients(
        state.params, batch, fixed or Fixed(), key_of_step(state), model=model, objective=objective,
        teacher=teacher, num_microbatches=num_microbatches, dropout=dropout,
    )  # fmt: skip
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(means["loss"])
    if spike_sigma:
        finite &= ~_is_spike(means["loss"], state.flags, spike_sigma)
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, finite=finite)
    params = optax.apply_updates(state.params, updates)

    def keep(new: Tree, old: Tree) -> Tree:
        def one(n: Any, o: Any) -> Any:  # an AdamState has seen to it itself
            return n if isinstance(n, AdamState) else jnp.where(finite, n, o)

        return jax.tree.map(one, new, old, is_leaf=lambda x: isinstance(x, AdamState))

    flags = _next_flags(state, finite, most_skipped)
    if spike_sigma:
        flags |= _with_loss(means["loss"], state.flags, finite)
    new_state = TrainState(
        step=state.step + 1,
        index=state.index + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        rng=state.rng,
        flags=flags,
    )
    metrics = {**means, "grad_norm": grad_norm, "num_targets": num_targets}
    told = {name: flags[name] for name in ("first_nonfinite", "skipped")}
    return new_state, {**metrics, **told}


def _next_flags(state: TrainState, finite: Array, most_skipped: int) -> dict[str, Array]:
    flags = state.flags
    in_a_row = jnp.where(finite, 0, flags["skipped_in_a_row"] + 1)
    first = flags["first_nonfinite"]
    return {
        **flags,
        "first_nonfinite": jnp.where((in_a_row <= most_skipped) | (first >= 0), first, state.step),
        "skipped": flags["skipped"] + (~finite).astype(jnp.int32),
        "skipped_in_a_row": in_a_row,
    }


def _is_spike(loss: Array, flags: dict[str, Array], sigma: float) -> Array:
    """bool[]: whether a loss is far above the last ones; never before half of them are there."""
    num = jnp.minimum(flags["num_losses"], NUM_LOSSES)
    known = jnp.arange(NUM_LOSSES) < num
    mean = jnp.sum(flags["losses"], where=known) / jnp.maximum(num, 1)
    variance = jnp.sum((flags["losses"] - mean) ** 2, where=known) / jnp.maximum(num, 1)
    return (num >= NUM_LOSSES // 2) & (loss > mean + sigma * jnp.sqrt(variance))


def _with_loss(loss: Array, flags: dict[str, Array], made: Array) -> dict[str, Array]:
    """The ring of losses after one more, if its update was made."""
    place = flags["num_losses"] % NUM_LOSSES
    losses = flags["losses"].at[place].set(jnp.where(made, loss, flags["losses"][place]))
    return {"losses": losses, "num_losses": flags["num_losses"] + made.astype(jnp.int32)}
