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
from gpt_jax.train.step import MOST_SKIPPED, train_step


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
        model=model,
        objective=make_objective(config.objective),
        optimizer=optimizer,
        teacher=teacher,
        num_microbatches=config.train.num_microbatches,
        dropout=config.model.dropout > 0,
        most_skipped=MOST_SKIPPED if config.train.on_nonfinite == "skip" else 0,
        spike_sigma=config.train.spike_sigma,
    )
    jitted = jax.jit(
        step,
        in_shardings=(
            where,
            sharding.batch_sharding(mesh),
            jax.tree.map(lambda x: x.sharding, fixed),
        ),
        out_shardings=(where, None),
        donate_argnums=0,
    )
    return sharding.on_mesh(mesh, jitted), sharding.on_mesh(mesh, jitted.lower)
