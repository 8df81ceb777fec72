"""Compiling the step while the first state is made: a start waits for the longer of the two."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax import trees
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.parallel import sharding
from gpt_jax.runs.state import Fixed, TrainState
from gpt_jax.types import Tree


def state_shapes(init: Callable[[], TrainState], where: TrainState) -> TrainState:
    """What `init` makes, as shapes with their shardings; computes nothing."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init),
        where,
    )


def fixed_shapes(like: Tree, mask: Tree, teacher: Tree) -> Fixed:
    """What a step reads and never changes; `like` are all parameters, `mask` those trained."""
    if all(jax.tree.leaves(mask)):
        return Fixed(None, teacher)
    return Fixed(trees.select(like, jax.tree.map(lambda trained: not trained, mask)), teacher)


def compile_early(
    step: Callable,
    lower: Callable,
    state: TrainState,
    fixed: Fixed,
    data: PreparedData,
    batch_size: int,
    mesh: Mesh,
) -> Callable:
    """The step, which a thread begins to compile; its first call waits for that.

    Only on CPU, and where all rows come from one place, so that the shapes of a batch are known
    without reading one. Elsewhere, and if the thread fails or guessed the shapes wrongly, the first
    call compiles as it would have without.

    Args:
      step: Jitted: (state, global batch, fixed) -> (state, metrics).
      lower: From shapes of the same to jax.stages.Lowered.
      state: Shapes with shardings.
      fixed: Shapes with shardings, or arrays.
      data: Whose batches it will get.
      batch_size: Rows of a global batch.
      mesh: The devices.
    """
    if mesh.devices.flat[0].platform != "cpu" or len(data.train.parts) != 1:
        return step
    (rows,) = data.train.parts.values()
    batch = sharding.abstract_batch(rows.batch([0]), batch_size, mesh)

    def compile_it() -> None:
        # What fails here fails in the first call too, where it is understood.
        with contextlib.suppress(Exception):
            lower(state, batch, fixed).compile()

    # No daemon: a process that ends while XLA is compiling would be aborted.
    thread = threading.Thread(target=compile_it, name="early-compile")
    thread.start()

    @functools.wraps(step)
    def waiting(*arguments: Any) -> Any:
        thread.join()
        return step(*arguments)

    return waiting
