"""Everything that a training step reads and writes, in one pytree."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.parallel import sharding
from gpt_jax.types import Array, Tree


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
      step: Steps taken: int32.
      index: Index of the next global batch: int32; it equals `step` unless batches were skipped.
      params: Parameters, f32.
      opt_state: The optimizer's slots.
      rng: Base key of dropout; a step folds in its number and the microbatch's.
      flags: `first_nonfinite`: int32, the first step whose loss or gradient was not finite and
        whose update was therefore left out; -1 if there is none.
    """

    step: Array
    index: Array
    params: Tree
    opt_state: Any
    rng: Array
    flags: dict[str, Array]


def make_init(model: Transformer, optimizer: optax.GradientTransformation, seed: int):
    """A function of no arguments that builds the first state."""

    def init() -> TrainState:
        key = jax.random.key(seed)
        params = nn.unbox(init_params(model, key))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            index=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            rng=jax.random.key_data(jax.random.fold_in(key, 1)),
            flags={"first_nonfinite": jnp.full((), -1, jnp.int32)},
        )

    return init


def abstract_params(model: Transformer) -> Tree:
    """Shapes, dtypes and logical axes (Flax boxes) of the parameters; computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def shardings(model: Transformer, init, mesh: Mesh) -> TrainState:
    """How the state lies on the mesh."""
    boxed = abstract_params(model)
    state = jax.eval_shape(init)
    params = sharding.param_shardings(boxed, mesh)
    return sharding.state_shardings(state, state.params, params, mesh)
