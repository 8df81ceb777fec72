"""From a config and a work directory to everything that the loop needs."""

import dataclasses
import fcntl
import functools
import json
from collections.abc import Callable
from typing import IO, Any

import jax
from etils import epath
from jax.sharding import Mesh

from gpt_jax import trees
from gpt_jax.data.pipeline import PreparedData, prepare
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.causal_lm import causal_lm
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.optim.optimizers import learning_rate, make_optimizer
from gpt_jax.parallel import sharding
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs import metrics
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import Checkpoints
from gpt_jax.runs.config import RunConfig, flatten, run_config
from gpt_jax.runs.receipt import session, write_json, write_receipt
from gpt_jax.runs.state import TrainState, make_init, shardings
from gpt_jax.scaling import counts
from gpt_jax.train.step import train_step

# What a run may change when it is continued: how it is computed, watched and stored, and how long
# it goes on; everything else decides its numbers.
_MAY_CHANGE = (
    "model.scan", "model.remat", "model.attention", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "train.duration", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.checkpoint_every", "train.keep", "train.sample_prompts", "train.sample_tokens",
    "train.tensorboard", "train.wandb",
    # Where the corpus lies may change; what it holds is checked by its fingerprint.
    "data.path", "data.validation_path",
)  # fmt: skip


@dataclasses.dataclass
class Training:
    """A run that is ready to go on from `state`.

    Attributes:
      config: The run's config.
      workdir: The run directory.
      data: Tokenizer and rows.
      mesh: The devices.
      model: The model.
      state: At `start`.
      start: Steps done.
      total: Steps of the run.
      clock: Turns durations into steps.
      learning_rate: By step.
      step: (state, global batch) -> (state, metrics): jitted, sharded, donates the state.
      checkpoints: Where states are saved.
      identity: A name that no other run has, the same whenever this one is continued.
      lock: Keeps other processes out of the run while it is open.
    """

    config: RunConfig
    workdir: epath.Path
    data: PreparedData
    mesh: Mesh
    model: Transformer
    state: TrainState
    start: int
    total: int
    clock: Clock
    learning_rate: Callable
    step: Callable
    checkpoints: Checkpoints
    identity: str
    lock: IO[str]

    def summary(self) -> str:
        """What is about to run, in two lines."""
        config, data = self.config, self.data.description
        kinds = sorted({device.device_kind for device in self.mesh.devices.flat})
        return (
            f"data:  {data['name']}, {data['train']['tokens']:,} tokens of "
            f"{data['tokenizer']['kind']} {self.data.tokenizer.vocab_size}\n"
            f"model: {trees.num_elements(self.state.params):,} parameters, "
            f"{self.clock.tokens_per_step:,} tokens a step, {self.total - self.start} steps "
            f"to go, {self.mesh.size} x {', '.join(kinds)}, {config.model.dtype}"
        )


def check_workdir(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether the directory holds this run already.

    Raises:
      ValueError: It holds another run or something else; the first field that differs is named
        with both values.
    """
    if not workdir.exists():
        return False
    if not workdir.is_dir():
        raise ValueError(f"--workdir: {str(workdir)!r} is a file")
    path = workdir / layout.CONFIG
    if not path.exists():
        # A run that was killed as it began has its tokenizer, but no config yet.
        ours = {layout.LOCK, layout.TOKENIZER, f"{layout.CONFIG}.partial"}
        if {entry.name for entry in workdir.iterdir()} - ours:
            raise ValueError(
                f"--workdir: {str(workdir)!r} holds other files and no run; give a new folder"
            )
        return False
    if not _saved_steps(workdir):
        return False  # nothing was trained: the config may be mended and the run begun again
    old = flatten(run_config(json.loads(path.read_text())).to_dict())
    for name, value in flatten(config.to_dict()).items():
        if name not in _MAY_CHANGE and old[name] != value:
            raise ValueError(
                f"{name}: {value!r} in the config, but the run in {str(workdir)!r} has "
                f"{old[name]!r}; give another --workdir to train anew"
            )
    return True


def _saved_steps(workdir: epath.Path) -> bool:
    folder = workdir / layout.CHECKPOINTS
    return folder.exists() and any(entry.name.isdigit() for entry in folder.iterdir())


def _lock(workdir: epath.Path) -> IO[str]:
    """Keeps others out of the run as long as the file is open."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / layout.LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--workdir: {str(workdir)!r} is in use by another process") from None
    return file


def _check_model(config: RunConfig, data: PreparedData, mesh: Mesh) -> None:
    platform = mesh.devices.flat[0].platform
    if config.model.attention == "cudnn" and (platform, config.model.dtype) != ("gpu", "bfloat16"):
        raise ValueError(
            f"model.attention: 'cudnn' needs a GPU and model.dtype bfloat16, not {platform} and "
            f"{config.model.dtype}"
        )
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is below the tokenizer's "
            f"{data.tokenizer.vocab_size} (data.tokenizer {config.data.tokenizer!r})"
        )
    for prompt in config.train.sample_prompts:
        length = 1 + len(data.tokenizer.encode(prompt))
        if length >= config.model.seq_len:
            raise ValueError(
                f"train.sample_prompts: {prompt[:40]!r} is {length} tokens, which leaves no place "
                f"in the model's context of {config.model.seq_len}"
            )


def set_up(
    config: RunConfig,
    workdir: epath.PathLike,
    cache_dir: epath.PathLike,
    devices: list | None = None,
) -> Training:
    """Prepares the data, builds the model and the step, restores or initializes the state.

    Nothing is written to `workdir` before everything that can be checked has been checked.

    Args:
      config: What to run.
      workdir: The run directory; a run in it is continued.
      cache_dir: Where prepared data is kept.
      devices: What to run on; None: all devices.

    Raises:
      ValueError: The mesh, batch, corpus, tokenizer, work directory or checkpoint does not fit
        the config.
    """
    workdir = epath.Path(workdir)
    resuming = check_workdir(workdir, config)
    if config.train.wandb:
        metrics.require_wandb(config.train.wandb)
    mesh = make_mesh(config.mesh, devices)
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, mesh)
    kept = workdir / layout.TOKENIZER
    tokenizer = load_tokenizer(kept, config.data.eos_token) if resuming else None
    data = prepare(config.data, cache_dir, tokenizer)
    _check_model(config, data, mesh)
    clock, total = _clock(config, data)
    model = Transformer(config.model, mesh.devices.flat[0].platform)
    optimizer = make_optimizer(config.optimizer, clock)
    init = make_init(model, optimizer, config.seed)
    where = shardings(model, init, mesh)

    lock = _lock(workdir)
    if not resuming:
        _write_run(workdir, config, data)
    checkpoints = Checkpoints(workdir / layout.CHECKPOINTS, keep=config.train.keep)
    state, start = _first_state(checkpoints, init, where, mesh, data)
    if start > total:
        raise ValueError(
            f"train.duration: {config.train.duration!r} is {total} steps, but the run in "
            f"{str(workdir)!r} has done {start}"
        )
    # A run that goes on longer than first planned is now this config's run.
    write_json(workdir / layout.CONFIG, config.to_dict())
    receipt = _write_receipt(workdir, config, data, state, session(mesh, start), total, resuming)

    step = functools.partial(
        train_step,
        model=model,
        objective=functools.partial(causal_lm, z_loss=config.train.z_loss),
        optimizer=optimizer,
        num_microbatches=config.train.num_microbatches,
        dropout=config.model.dropout > 0,
    )
    jitted = jax.jit(
        step,
        in_shardings=(where, sharding.batch_sharding(mesh)),
        out_shardings=(where, None),
        donate_argnums=0,
    )
    return Training(
        config=config,
        workdir=workdir,
        data=data,
        mesh=mesh,
        model=model,
        state=state,
        start=start,
        total=total,
        clock=clock,
        learning_rate=learning_rate(config.optimizer, clock),
        step=sharding.on_mesh(mesh, jitted),
        checkpoints=checkpoints,
        identity=f"{workdir.name}-{receipt['id']}",
        lock=lock,
    )


def _clock(config: RunConfig, data: PreparedData) -> tuple[Clock, int]:
    tokens_per_step = config.train.batch_size * config.data.seq_len
    clock = Clock(tokens_per_step, data.train.num_tokens)
    total = Duration.parse("train.duration", config.train.duration).steps(clock)
    return dataclasses.replace(clock, total_steps=total), total


def _write_run(workdir: epath.Path, config: RunConfig, data: PreparedData) -> None:
    # The tokenizer first: config.json is what makes the folder a run.
    data.tokenizer.save(workdir / layout.TOKENIZER)
    write_json(workdir / layout.CONFIG, config.to_dict())


def _first_state(checkpoints: Checkpoints, init, where, mesh: Mesh, data: PreparedData):
    steps = checkpoints.steps()
    if not steps:
        return sharding.on_mesh(mesh, jax.jit(init, out_shardings=where))(), 0
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init),
        where,
    )
    state, manifest = checkpoints.restore(steps[-1], like)
    data.check_fingerprints(manifest["data"])
    return state, steps[-1]


def _write_receipt(
    workdir: epath.Path,
    config: RunConfig,
    data: PreparedData,
    state: TrainState,
    new_session: dict[str, Any],
    total: int,
    resuming: bool,
) -> dict[str, Any]:
    facts = {
        "data": data.description,
        "num_parameters": trees.num_elements(state.params),
        "flops_per_token": counts.flops_per_token(config.model, config.data.seq_len),
        "steps": total,
        "tokens": total * config.train.batch_size * config.data.seq_len,
    }
    return write_receipt(workdir / layout.RECEIPT, facts, new_session, anew=not resuming)
