"""The step of a run compiled from its config alone, for devices that need not be here.

No data are read and no arrays are made.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax import trees
from gpt_jax.data.examples import Layout
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.lora import check_targets
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.transforms import row_lengths
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.trainable import trainable_mask
from gpt_jax.optim.width_scaling import WidthScaling
from gpt_jax.parallel import sharding
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.state import Fixed, TrainState, abstract_on_mesh, make_init, shardings
from gpt_jax.scaling import counts
from gpt_jax.train.mesh_checks import check_mesh
from gpt_jax.train.sharded_step import jit_step
from gpt_jax.types import Batch, Tree


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What compiling told.

    Attributes:
      executable: jax.stages.Compiled, not to be run.
      mesh: Where it would run.
      seconds, processor_seconds: What lowering and compiling took, by the clock and of all cores.
      state_bytes: Of a device's share of parameters, slots and the rest of the state.
      argument_bytes, output_bytes, alias_bytes, temporary_bytes: Of a device, as the compiler
        tells them; what is donated is both argument and output and counted in alias_bytes.
      flops_per_token: By counts.FLOPS_RULE.
      recomputed_flops_per_token: What model.remat makes the backward pass compute again, which the
        rule leaves out.
      num_parameters: All.
    """

    executable: Any
    mesh: Mesh
    seconds: float
    processor_seconds: float
    state_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    flops_per_token: float
    recomputed_flops_per_token: float
    num_parameters: int

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that are not donated, and temporaries, of a device."""
        kept = self.output_bytes - self.alias_bytes
        return self.argument_bytes + kept + self.temporary_bytes


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run's parts with shapes in the place of arrays.

    Attributes:
      mesh, model, optimizer: As in a run.
      params: Shapes of all parameters with their shardings.
      mask: True for what is trained.
      state, fixed: What a step reads, as shapes with shardings.
    """

    mesh: Mesh
    model: Transformer
    optimizer: Any
    params: Tree
    mask: Tree
    state: TrainState
    fixed: Fixed

    @property
    def state_bytes(self) -> int:
        """Of a device's share of parameters, slots and the rest of the state."""
        return bytes_on_a_device((self.state, self.fixed))


def abstract_run(config: RunConfig, devices: list) -> AbstractRun:
    """The parts of a run of this config, without an array.

    Raises:
      ValueError: The mesh or the batch does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    model = Transformer(config.model, mesh.devices.flat[0].platform)
    params = abstract_on_mesh(model, mesh)
    if config.model.lora_rank:
        check_targets(params, config.model)
    mask = trainable_mask(params, config.optimizer, bool(config.model.lora_rank))
    scaling = WidthScaling(config.model.width_multiplier, config.model.depth_multiplier)
    optimizer = make_optimizer(config.optimizer, clock(config), scaling)
    init = make_init(model, optimizer, config.seed, mask)
    where = shardings(model, init, mesh)
    state = jax.tree.map(_struct, jax.eval_shape(init), where)
    frozen = None
    if not all(jax.tree.leaves(mask)):
        frozen = trees.select(params, jax.tree.map(lambda trained: not trained, mask))
    return AbstractRun(mesh, model, optimizer, params, mask, state, Fixed(frozen))


def compile_step(config: RunConfig, devices: list) -> CompiledStep:
    """Lowers and compiles the very step that a run of this config takes.

    Args:
      config: What would run; rows of a corpus, not examples of tasks, whose shape only data tell.
      devices: Of topologies.devices, or real ones.

    Raises:
      ValueError: The mesh or the batch does not fit the devices, or the objective needs data.
      jax.errors.JaxRuntimeError: The compiler refuses, as for want of memory.
    """
    run = abstract_run(config, devices)
    batch = abstract_batch(config, run.mesh)
    began, computed = time.monotonic(), time.process_time()
    where = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    _, lower = jit_step(config, run.model, run.optimizer, None, where, run.fixed, run.mesh)
    executable = lower(run.state, batch, run.fixed).compile()
    memory = executable.memory_analysis()
    trained = {name for name, is_trained in trees.flatten(run.mask).items() if is_trained}
    length = batch["tokens"].shape[1]
    source = batch["encoder_tokens"].shape[1] if "encoder_tokens" in batch else 0
    flops = counts.flops_per_token(config.model, length, source_length=source, trained=trained)
    again = _recomputed(config.model, length, source)
    return CompiledStep(
        executable=executable,
        mesh=run.mesh,
        seconds=time.monotonic() - began,
        processor_seconds=time.process_time() - computed,
        state_bytes=run.state_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops_per_token=flops * length / config.data.seq_len,
        recomputed_flops_per_token=again * length / config.data.seq_len,
        num_parameters=trees.num_elements(run.params),
    )


def _recomputed(config: TransformerConfig, length: int, source: int) -> float:
    """FLOPs a token of the forward products that the backward pass computes again."""
    forward = functools.partial(
        counts.flops_per_token, config, length, source_length=source, trained=(), head=False
    )
    if config.remat == "full":
        return forward()
    # "dots" keeps the products with weights, not those of attention.
    return forward() - forward(attention=False) if config.remat == "dots" else 0.0


def clock(config: RunConfig) -> Clock:
    """The run's clock as far as the config tells it: an epoch counts as 10^12 tokens."""
    clock = Clock(config.train.batch_size * config.data.seq_len, 10**12)
    total = Duration.parse("train.duration", config.train.duration).steps(clock)
    return dataclasses.replace(clock, total_steps=total)


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Shapes and shardings of a global batch of the config's objective.

    Raises:
      ValueError: Only data tell them.
    """
    if config.tasks.names or config.objective.name in ("distillation", "dpo"):
        raise ValueError(
            f"objective.name: {config.objective.name!r} with tasks.names {config.tasks.names} has "
            "batches whose shape only the data tell; what trains on rows of a corpus can be "
            "compiled ahead of time"
        )
    seq_len, source_len = row_lengths(config.objective, config.data.seq_len, config.model.family)
    record = {"tokens": np.zeros(1, np.int32), "targets": np.zeros(1, np.int32)}
    record["loss_mask"] = np.zeros(1, np.float32)
    if source_len:
        record["encoder_tokens"] = np.zeros(1, np.int32)
    if config.objective.name in ("permutation_lm", "prefix_lm"):
        record |= {name: np.zeros(1, np.int32) for name in ("key_ranks", "query_ranks")}
    fields = Layout(seq_len, source_len).collate([[record]])
    return sharding.abstract_batch(fields, config.train.batch_size, mesh)


def bytes_on_a_device(tree: Tree) -> int:
    """Bytes of one device's shares of arrays, or of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def _struct(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
