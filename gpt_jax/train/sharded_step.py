"""The step of a run as it is compiled for a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.parallel import sharding
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.state import Fixed, TrainState
from gpt_jax.train.step import MOST_SKIPPED, gradients, key_of_step, train_step
from gpt_jax.types import Batch, Tree


def jit_step(
    config: RunConfig,
    model: Transformer,
    optimizer: Any,
    teacher: Transformer | None,
    where: TrainState,
    fixed: Fixed,
    mesh: Mesh,
) -> tuple[Callable, Callable]:
    """The step of a run, sharded, and what lowers it.

    Args:
      config: What to run.
      model, optimizer, teacher: Made of it.
      where: Shardings of the state.
      fixed: Arrays, or their shapes with shardings.
      mesh: The devices.

    Returns:
      (state, global batch, fixed) -> (state, metrics), which donates the state; and the same to a
      jax.stages.Lowered, for which shapes do.
    """
    step = functools.partial(
        train_step,
        optimizer=optimizer,
        **_of_the_gradient(config, model, teacher, mesh),
        most_skipped=MOST_SKIPPED if config.train.on_nonfinite == "skip" else 0,
        spike_sigma=config.train.spike_sigma,
    )
    jitted = jax.jit(
        step,
        # The batch lies as sharding.global_batch has laid it: its arrays differ in rank.
        in_shardings=(where, None, jax.tree.map(lambda x: x.sharding, fixed)),
        out_shardings=(where, None),
        donate_argnums=0,
    )
    return sharding.on_mesh(mesh, jitted), sharding.on_mesh(mesh, jitted.lower)


def jit_gradients(
    config: RunConfig, model: Transformer, where: TrainState, mesh: Mesh
) -> Callable[[TrainState, Batch, Fixed], Tree]:
    """The gradient that the next step of a run without a teacher would take."""
    how = _of_the_gradient(config, model, None, mesh)

    def grads(state: TrainState, batch: Batch, fixed: Fixed) -> Tree:
        return gradients(state.params, batch, fixed, key_of_step(state), **how)[0]

    return sharding.on_mesh(mesh, jax.jit(grads, out_shardings=where.params))


def _of_the_gradient(
    config: RunConfig, model: Transformer, teacher: Transformer | None, mesh: Mesh
) -> dict[str, Any]:
    """What step.gradients takes beside arrays."""
    accumulated = config.train.num_microbatches
    if mesh.shape["stage"] > 1:  # the microbatches go through the stages, and add up there
        model, accumulated = model.clone(num_microbatches=accumulated), 1
    return {
        "model": model,
        "objective": make_objective(config.objective),
        "teacher": teacher,
        "num_microbatches": accumulated,
        "dropout": config.model.dropout > 0,
    }
