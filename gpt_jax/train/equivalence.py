"""Whether a config trains the same on every mesh: losses and gradients, on simulated devices.

A mesh says how the numbers are computed, not which: so a run on any of them must agree with the
same run on one device, but for rounding. Everything is computed in float32, without dropout, whose
draws follow the microbatches, and with parameters that leave no gradient zero at the first step
(model.init "gpt2": "fan_in" begins with residual projections of zero).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax import trees
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import AXES, MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.state import Fixed, make_draw, make_init, run_once
from gpt_jax.train.ahead_of_time import AbstractRun, abstract_batch, abstract_run
from gpt_jax.train.preflight import with_fields
from gpt_jax.train.sharded_step import jit_gradients, jit_step
from gpt_jax.types import Tree

NUM_DEVICES = 8
TOLERANCE = 1e-5
# Each axis alone, then together.
MESHES: tuple[dict[str, int], ...] = (
    {"data": 4},
    {"fsdp": 4},
    {"tensor": 2},
    {"sequence": 4},
    {"expert": 4},
    {"stage": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "stage": 2, "tensor": 2},
)
_COMMON = {"model.dtype": "float32", "model.dropout": 0.0, "model.init": "gpt2"}
# A gradient below this share of the whole one is measured against that share: what is zero but for
# rounding (as of the keys' biases, which the softmax does not see) has no norm of its own.
_NO_GRADIENT = 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A mesh against one device.

    Attributes:
      mesh: Axes and their sizes.
      changes: What was changed in the config, there and on the one device, so that the mesh has
        something to split.
      refusal: Why the config does not run on the mesh; "": it does.
      loss: The largest relative difference of a step's loss.
      gradient: The largest norm of a difference of a leaf's gradient at the first step, relative to
        the norm of the leaf's.
      leaf: Where that is.
    """

    mesh: dict[str, int]
    changes: dict[str, Any]
    refusal: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    leaf: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both are within TOLERANCE; of what was refused there is nothing to say."""
        within = self.loss <= TOLERANCE and self.gradient <= TOLERANCE  # which NaN is not
        return bool(self.refusal) or within


def compare(
    config: RunConfig, steps: int = 20, meshes: Sequence[dict[str, int]] = MESHES
) -> Iterator[Agreement]:
    """Trains a config on one device and on every mesh.

    Args:
      config: Small enough to run here; rows of a corpus, for which random ones stand.
      steps: How many to compare.
      meshes: Sizes by axis.

    Raises:
      ValueError: Only data tell the shape of the config's batches, or there are too few devices.
    """
    _check_devices(meshes)
    config = with_fields(config, _COMMON)
    _on_mesh(config, {})  # what does not run on one device is refused as a whole
    abstract_batch(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    known: dict[tuple, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for mesh in meshes:
        changes = _changes(config, mesh)
        try:
            one, other = (_on_mesh(with_fields(config, changes), sizes) for sizes in ({}, mesh))
        except ValueError as error:
            yield Agreement(mesh, changes, refusal=" ".join(str(error).split()))
            continue
        key = tuple(sorted(changes.items()))
        if key not in known:
            known[key] = _train(*one, steps)
        yield _agreement(mesh, changes, known[key], _train(*other, steps))


def _on_mesh(config: RunConfig, mesh: dict[str, int]) -> tuple[RunConfig, AbstractRun]:
    """The config with these sizes, and its parts.  Raises ValueError if it does not run there."""
    sizes = {axis: mesh.get(axis, 1) for axis in AXES}
    config = with_fields(config, {f"mesh.{axis}": size for axis, size in sizes.items()})
    return config, abstract_run(config, jax.devices()[: math.prod(sizes.values())])


def _check_devices(meshes: Sequence[dict[str, int]]) -> None:
    needed = max(math.prod(mesh.values()) for mesh in meshes)
    if len(jax.devices()) < needed:
        raise ValueError(
            f"--equivalence: {len(jax.devices())} devices are fewer than the {needed} of a mesh"
        )


def _changes(config: RunConfig, mesh: dict[str, int]) -> dict[str, Any]:
    """What the config lacks for the mesh's axes to have something to split."""
    model, changes = config.model, {}
    if mesh.get("sequence", 1) > 1 and model.attention not in ("auto", "chunked"):
        changes["model.attention"] = "auto"
    if mesh.get("expert", 1) > 1 and not model.num_experts:
        changes |= {"model.num_experts": 4, "model.expert_capacity": 1.0}
    stages = mesh.get("stage", 1)
    if stages > 1:
        if not model.scan:
            changes["model.scan"] = True
        if model.num_layers % stages:
            changes["model.num_layers"] = stages
        if config.train.num_microbatches < stages:
            changes["train.num_microbatches"] = stages
        if config.train.sample_prompts:
            changes["train.sample_prompts"] = ()
    return changes


def _train(
    config: RunConfig, run: AbstractRun, steps: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of the steps, and the gradient of the first one by name."""
    where = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    init = make_init(run.model, run.optimizer, config.seed, run.mask)
    state = run_once(init, where, run.mesh)
    fixed = Fixed(_frozen(config, run))
    step, _ = jit_step(config, run.model, run.optimizer, None, where, run.fixed, run.mesh)
    gradient = jit_gradients(config, run.model, where, run.mesh)
    losses, grads = [], {}
    for number in range(steps):
        batch = _made_up(config, run.mesh, number)
        if not grads:
            grads = trees.flatten(jax.device_get(gradient(state, batch, fixed)))
        state, metrics = step(state, batch, fixed)
        losses.append(float(metrics["loss"]))
    return np.array(losses), grads


def _frozen(config: RunConfig, run: AbstractRun) -> Tree:
    """The parameters that are not trained; None: all are."""
    if all(jax.tree.leaves(run.mask)):
        return None
    where = jax.tree.map(lambda leaf: leaf.sharding, run.params)
    params = run_once(make_draw(run.model, config.seed), where, run.mesh)
    return trees.select(params, jax.tree.map(lambda trained: not trained, run.mask))


def _made_up(config: RunConfig, mesh: Any, number: int) -> dict[str, jax.Array]:
    """Global batch `number`: random ids in documents of unequal lengths, with some padding."""
    rng = np.random.default_rng([config.seed, number])
    shapes = abstract_batch(config, mesh)
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    for prefix in ("", "encoder_"):
        if prefix + "tokens" not in batch:
            continue
        B, T = batch[prefix + "tokens"].shape
        segments, positions = _documents(rng, B, T)
        batch[prefix + "segment_ids"], batch[prefix + "positions"] = segments, positions
        for name in {prefix + "tokens", "targets"} & set(batch):
            ids = rng.integers(0, config.model.vocab_size, batch[name].shape)
            batch[name] = ids.astype(np.int32)
    shown = batch["segment_ids"] > 0
    batch["loss_mask"] = (shown & (rng.random(shown.shape) < 0.7)).astype(np.float32)
    for name in ("key_ranks", "query_ranks"):
        if name in batch:
            batch[name] = rng.integers(0, 8, batch[name].shape).astype(np.int32)
    rows = sharding.local_rows(len(shown), mesh)
    return sharding.global_batch(batch, rows, len(shown), mesh)


def _documents(rng: np.random.Generator, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """segment_ids and positions, int32[B, T], of two documents and padding in each row."""
    ends = np.sort(rng.integers(1, T + 1, (B, 2)), axis=1)
    columns = np.arange(T)
    first, second = columns < ends[:, :1], columns < ends[:, 1:]
    segments = np.where(first, 1, np.where(second, 2, 0))
    positions = np.where(first, columns, np.where(second, columns - ends[:, :1], 0))
    return segments.astype(np.int32), positions.astype(np.int32)


def _agreement(mesh, changes, one, other) -> Agreement:
    losses = np.abs(other[0] - one[0]) / np.abs(one[0])
    whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in one[1].values()))
    apart = {
        name: np.linalg.norm((other[1][name] - grad).ravel())
        / max(np.linalg.norm(grad.ravel()), _NO_GRADIENT * whole)
        for name, grad in one[1].items()
    }
    leaf = max(apart, key=lambda name: np.nan_to_num(apart[name], nan=np.inf))
    return Agreement(mesh, changes, "", float(np.max(losses)), float(apart[leaf]), leaf)


def table(agreements: Iterator[Agreement], say: Callable[[str], None]) -> bool:
    """Tells of each mesh as it is known; whether there was something to compare, and all agree."""
    widths = "{:34} {:>9} {:>9}  {}"
    say(widths.format("mesh", "losses", "gradient", "where it differs most"))
    all_agree, compared = True, 0
    for found in agreements:
        name = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
        if found.refusal:
            say(f"{name:34} refused: {found.refusal}")
            continue
        verdict = "" if found.agrees else f"  DISAGREES (over {TOLERANCE:.0e})"
        figures = (f"{found.loss:.1e}", f"{found.gradient:.1e}")
        say(widths.format(name, *figures, found.leaf + verdict))
        if found.changes:
            words = " ".join(f"{field}={value}" for field, value in found.changes.items())
            say(f"    with {words}")
        all_agree &= found.agrees
        compared += 1
    return all_agree and compared > 0
