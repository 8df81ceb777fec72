"""Everything that a training step reads and writes, in one pytree."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt_jax import trees
from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Tree


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
      step: Steps taken: int32.
      index: Index of the next global batch: int32; it equals `step` unless batches were skipped.
      params: Parameters that are trained, f32; None where one is frozen.
      opt_state: The optimizer's slots.
      rng: Base key of dropout; a step folds in its number and the microbatch's.
      flags: What the step knows of updates that were left out, as `first_flags` makes it.
    """

    step: Array
    index: Array
    params: Tree
    opt_state: Any
    rng: Array
    flags: dict[str, Array]


@flax.struct.dataclass
class Fixed:
    """What a step reads and never changes.

    Attributes:
      frozen: The parameters that are not trained; None in the place of those that are, or instead
        of the whole tree if all are.
      teacher: The parameters of another model.
    """

    frozen: Tree = None
    teacher: Tree = None


NUM_LOSSES = 128  # whose mean and deviation say what a spike is


def first_flags() -> dict[str, Array]:
    """The flags of a run that begins.

    Returns:
      first_nonfinite: int32, the step that the run has to stop (or go back) for: its update was
        left out, as its loss or gradient was not finite or the loss a spike; -1: there is none.
      skipped: int32, updates that were left out so far.
      skipped_in_a_row: int32, those since the last that was not.
      losses: f32[NUM_LOSSES], the newest losses whose updates were made, as a ring; filled where
        spikes are looked for.
      num_losses: int32, how many were put into it.
    """
    return {
        "first_nonfinite": jnp.full((), -1, jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
        "losses": jnp.zeros((NUM_LOSSES,), jnp.float32),
        "num_losses": jnp.zeros((), jnp.int32),
    }


def all_params(state: TrainState, fixed: Fixed) -> Tree:
    """Trained and frozen parameters in one tree."""
    return state.params if fixed.frozen is None else trees.merge(state.params, fixed.frozen)


def make_draw(model: Transformer, seed: int):
    """A function of no arguments that draws all parameters."""
    return lambda: nn.unbox(init_params(model, jax.random.key(seed)))


def make_init(
    model: Transformer, optimizer: optax.GradientTransformation, seed: int, mask: Tree = None
):
    """A function of no arguments that builds the first state.

    Args:
      model: Its parameters are drawn.
      optimizer: Gives the slots.
      seed: Of the parameters and the dropout.
      mask: True for the parameters that are trained, and thus part of the state; None: all are.
    """

    def init() -> TrainState:
        key = jax.random.key(seed)
        params = make_draw(model, seed)()
        params = params if mask is None else trees.select(params, mask)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            index=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
            flags=first_flags(),
        )

    return init


def options_of_once(platform: str) -> dict[str, Any]:
    """For compiling what runs once on a platform of JAX (docs/speed.md).

    On CPU compiling it takes longer than running it, and LLVM's first level takes less; and XLA
    would run draws side by side, whose temporaries are most of what a run ever holds. Same bits.
    """
    if platform != "cpu":
        return {}
    options: dict[str, Any] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if not jax.config.read("jax_disable_most_optimizations"):  # which asks for less than that
        options["xla_backend_optimization_level"] = 1
    return options


def run_once(fn: Callable[[], Tree], where: Tree, mesh: Mesh) -> Tree:
    """What `fn` makes of nothing, laid on the mesh by the shardings `where`."""
    options = options_of_once(mesh.devices.flat[0].platform)
    jitted = jax.jit(fn, out_shardings=where, compiler_options=options)
    return sharding.on_mesh(mesh, jitted)()


def abstract_params(model: Transformer) -> Tree:
    """Shapes, dtypes and logical axes (Flax boxes) of the parameters; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def shardings(model: Transformer, init, mesh: Mesh) -> TrainState:
    """How the state lies on the mesh."""
    boxed = abstract_params(model)
    params = sharding.param_shardings(boxed, mesh)
    return sharding.state_shardings(jax.eval_shape(init), nn.unbox(boxed), params, mesh)


def abstract_on_mesh(model: Transformer, mesh: Mesh) -> Tree:
    """ShapeDtypeStructs of all parameters with how they lie on the mesh."""
    boxed = abstract_params(model)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
