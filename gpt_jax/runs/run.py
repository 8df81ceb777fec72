"""A run directory, from the outside: its config, tokenizer, model and parameters."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.checkpoints import Checkpoints
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.state import abstract_params
from gpt_jax.types import Tree

CONFIG, RECEIPT, METRICS, TOKENIZER = (
    "config.json",
    "receipt.json",
    "metrics.jsonl",
    "tokenizer.json",
)
CHECKPOINTS, SAMPLES, LOSS_CURVE, EVENTS, LOCK = (
    "checkpoints",
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


def open_run(workdir: epath.PathLike, step: int | None = None, **model_overrides: Any) -> Run:
    """Reads a run for use: evaluation, generation, conversion.

    Args:
      workdir: The run directory.
      step: The checkpoint to read; None: the newest.
      model_overrides: Fields of TransformerConfig that change how the model is computed, not what
        it computes: scan, remat, dtype, attention.

    Raises:
      ValueError: No run there, no checkpoint yet, no such step, or a damaged one.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    folder = workdir / CHECKPOINTS
    checkpoints = Checkpoints(folder) if folder.exists() else None
    steps = checkpoints.steps() if checkpoints else []
    if not steps:
        raise ValueError(f"--run: {str(workdir)!r} has no checkpoint yet")
    step = steps[-1] if step is None else step
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model_overrides))
    mesh = make_mesh(MeshConfig())
    model = Transformer(config.model, mesh.devices.flat[0].platform)
    boxed = abstract_params(model)
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    try:
        params, manifest = checkpoints.restore_params(step, like)
    finally:
        checkpoints.close()
    tokenizer = load_tokenizer(workdir / TOKENIZER, config.data.eos_token)
    return Run(workdir, config, tokenizer, model, params, step, manifest["data"])
