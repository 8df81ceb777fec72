"""A run directory, from the outside: its config, tokenizer, model and parameters."""

import dataclasses
import json
from typing import Any

import jax
from etils import epath

from gpt_jax import trees
from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.models.transformer import Transformer
from gpt_jax.optim.trainable import trainable_mask
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.best import best_steps, metric_mode
from gpt_jax.runs.checkpoint_reader import CheckpointReader
from gpt_jax.runs.checkpoints import restore_params
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.metrics import read_rows
from gpt_jax.runs.state import abstract_on_mesh
from gpt_jax.types import Tree

CONFIG, RECEIPT, METRICS, TOKENIZER = (
    "config.json",
    "receipt.json",
    "metrics.jsonl",
    "tokenizer.json",
)
EVALUATIONS = "evaluations.jsonl"
CHECKPOINTS, BASE, SAMPLES, LOSS_CURVE, EVENTS, LOCK = (
    "checkpoints",
    "base",
    "samples.jsonl",
    "loss.png",
    "tensorboard",
    ".lock",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is read from a run directory.

    Attributes:
      workdir: The directory.
      config: The run's config.
      tokenizer: The tokenizer it was trained with.
      model: The model; `model.apply({"params": params}, ...)`.
      params: The parameters of `step`.
      step: The checkpoint that was read.
      data_fingerprints: Of the splits it was trained and judged on.
    """

    workdir: epath.Path
    config: RunConfig
    tokenizer: Tokenizer
    model: Transformer
    params: Tree
    step: int
    data_fingerprints: dict[str, str]


def read_config(workdir: epath.PathLike) -> RunConfig:
    """The config of a run directory.

    Raises:
      ValueError: The directory holds no run.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"--run: {str(workdir)!r} holds no run (no {CONFIG} in it)")
    return run_config(json.loads(path.read_text()))


def open_run(
    workdir: epath.PathLike,
    step: int | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **model_overrides: Any,
) -> Run:
    """Reads a run for use: evaluation, generation, conversion.

    Args:
      workdir: The run directory.
      step: The checkpoint to read; None: the best by the run's metric if it keeps the best, else
        the newest. Of those that are as they were saved: a damaged one is passed over, with a
        CheckpointWarning.
      mesh: Where the parameters go; None: all devices, along data.
      model_overrides: Fields of TransformerConfig that change how the model is computed, not what
        it computes: scan, remat, dtype, attention.

    Raises:
      ValueError: No run there, no checkpoint yet, no such step, that step is damaged, or all are.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    folder = workdir / CHECKPOINTS
    checkpoints = CheckpointReader(folder) if folder.exists() else None
    steps = checkpoints.steps() if checkpoints else []
    if not steps:
        raise ValueError(f"--run: {str(workdir)!r} has no checkpoint yet")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model_overrides))
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    model = Transformer(config.model, mesh.devices.flat[0].platform)
    like = abstract_on_mesh(model, mesh)
    frozen, trained = None, like
    if (workdir / BASE).exists():
        mask = trainable_mask(like, config.optimizer, bool(config.model.lora_rank))
        trained = trees.select(like, mask)
        frozen = trees.select(like, jax.tree.map(lambda chosen: not chosen, mask))
    try:
        if step is None:
            params, manifest, step = checkpoints.good_params(
                lambda steps: _default_step(workdir, config, steps), trained
            )
        else:
            params, manifest = checkpoints.restore_params(step, trained)
    finally:
        checkpoints.close()
    if frozen is not None:
        params = trees.merge(params, restore_params(workdir / BASE, frozen)[0])
    tokenizer = load_tokenizer(workdir / TOKENIZER, config.data.eos_token)
    return Run(workdir, config, tokenizer, model, params, step, manifest["data"])


def _default_step(workdir: epath.Path, config: RunConfig, steps: list[int]) -> int:
    if not config.train.keep_best:
        return steps[-1]
    rows = read_rows(workdir / METRICS)
    mode = metric_mode(config.train.metric, config.train.metric_mode)
    best = best_steps(rows, config.train.metric, mode, len(rows))
    return next((step for step in best if step in steps), steps[-1])
