"""From a config and a work directory to everything that the loop needs."""

import dataclasses
from collections.abc import Callable
from typing import IO, Any

import jax
from etils import epath
from jax.sharding import Mesh

from gpt_jax import trees
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.lora import check_targets
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.objectives import Objective, make_objective
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.optim.optimizers import learning_rate, make_optimizer
from gpt_jax.optim.trainable import trainable_mask
from gpt_jax.optim.width_scaling import WidthScaling
from gpt_jax.parallel.distributed import peers
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs import metrics
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import Checkpoints, fingerprint
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.data import prepare_run
from gpt_jax.runs.events import Phases
from gpt_jax.runs.receipt import session
from gpt_jax.runs.state import (
    Fixed,
    TrainState,
    abstract_on_mesh,
    all_params,
    make_draw,
    make_init,
    run_once,
    shardings,
)
from gpt_jax.scaling import counts
from gpt_jax.train.early_compile import compile_early, fixed_shapes, state_shapes
from gpt_jax.train.initial import first_params, load_teacher
from gpt_jax.train.mesh_checks import check_mesh
from gpt_jax.train.sharded_step import jit_step
from gpt_jax.train.workdir import (
    find_run,
    lock_workdir,
    prediction_facts,
    restored,
    restored_base,
    write_files,
    write_run,
)
from gpt_jax.types import Tree


@dataclasses.dataclass
class Training:
    """A run that is ready to go on from `state`.

    Attributes:
      config: The run's config.
      workdir: The run directory.
      cache_dir: Where prepared data is kept.
      data: Tokenizer and rows.
      mesh: The devices.
      model: The model.
      objective: What is measured on held-out rows.
      teacher: The model of fixed.teacher, or None.
      state: At `start`.
      fixed: Parameters that are read and not trained.
      start: Steps done.
      total: Steps of the run.
      clock: Turns durations into steps.
      learning_rate: By step.
      flops_per_token: Of a step, by counts.FLOPS_RULE.
      step: (state, global batch, fixed) -> (state, metrics): jitted, sharded, donates the state.
      lower: From the same arguments to the lowered step (jax.stages.Lowered).
      checkpoints: Where states are saved.
      metadata: What is saved with each of them: JSON values.
      identity: A name that no other run has, the same whenever this one is continued.
      lock: Keeps other processes out of the run while it is open.
      phases: What its time was spent on since it began to be set up.
    """

    config: RunConfig
    workdir: epath.Path
    cache_dir: epath.PathLike
    data: PreparedData
    mesh: Mesh
    model: Transformer
    objective: Objective
    teacher: Transformer | None
    state: TrainState
    fixed: Fixed
    start: int
    total: int
    clock: Clock
    learning_rate: Callable
    flops_per_token: float
    step: Callable
    lower: Callable
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    identity: str
    lock: IO[str]
    phases: Phases = dataclasses.field(default_factory=Phases)

    def params(self) -> Tree:
        """All parameters, frozen ones too, as the model takes them."""
        return all_params(self.state, self.fixed)

    def summary(self) -> str:
        """What is about to run, in two lines."""
        config, data = self.config, self.data.description
        kinds = sorted({device.device_kind for device in self.mesh.devices.flat})
        trained, total = (trees.num_elements(p) for p in (self.state.params, self.params()))
        frozen = f" ({trained:,} trained)" if trained != total else ""
        return (
            f"data:  {data['name']}, {data['train']['tokens']:,} tokens of "
            f"{data['tokenizer']['kind']} {self.data.tokenizer.vocab_size}\n"
            f"model: {total:,} parameters{frozen}, "
            f"{self.clock.tokens_per_step:,} tokens a step, {self.total - self.start} steps "
            f"to go, {self.mesh.size} x {', '.join(kinds)}, {config.model.dtype}"
        )


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
    for prompt in config.train.sample_prompts if config.model.family == "decoder" else ():
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
    phases: Phases | None = None,
) -> Training:
    """Prepares the data, builds the model and the step, restores or initializes the state.

    Of several processes all do so together; process 0 writes what is not in parts.
    Nothing is written to `workdir` before everything that can be checked has been checked.

    Args:
      config: What to run.
      workdir: The run directory; a run in it is continued.
      cache_dir: Where prepared data is kept.
      devices: What to run on; None: all devices.
      phases: What the process has spent its time on so far; None: it begins here.

    Raises:
      ValueError: The mesh, batch, corpus, tokenizer, work directory or checkpoint does not fit
        the config.
    """
    workdir, phases = epath.Path(workdir), phases or Phases()
    peers().tell_where(lambda: f"phase {phases.now[0]!r}")
    resuming = find_run(workdir, config)
    predicted = prediction_facts(workdir, config, resuming)
    if config.train.wandb:
        metrics.require_wandb(config.train.wandb)
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    kept = workdir / layout.TOKENIZER
    tokenizer = load_tokenizer(kept, config.data.eos_token) if resuming else None
    data = peers().host_first(
        "after preparing the data",
        lambda: prepare_run(config, cache_dir, tokenizer, workdir if resuming else None),
    )
    _check_model(config, data, mesh)
    clock, total = _clock(config, data)
    model = Transformer(config.model, mesh.devices.flat[0].platform)
    scaling = WidthScaling(config.model.width_multiplier, config.model.depth_multiplier)
    optimizer = make_optimizer(config.optimizer, clock, scaling)
    like = abstract_on_mesh(model, mesh)
    if config.model.lora_rank:
        check_targets(like, config.model)
    mask = trainable_mask(like, config.optimizer, bool(config.model.lora_rank))
    init = make_init(model, optimizer, config.seed, mask)
    where = shardings(model, init, mesh)
    teacher = _teacher(config, mesh)
    state_like = state_shapes(init, where)
    fixed_like = fixed_shapes(like, mask, teacher[1] if teacher else None)
    jitted, lower = jit_step(
        config, model, optimizer, teacher[0] if teacher else None, where, fixed_like, mesh
    )
    step = compile_early(jitted, lower, state_like, fixed_like, data, config.train.batch_size, mesh)
    first = None if resuming else _first(config, model, init, where, mask, mesh, data)

    lock = lock_workdir(workdir)
    if first is not None:
        write_run(workdir, config, data, first[1])
    keep, keep_every = config.train.keep, config.train.keep_every_steps(clock)
    checkpoints = Checkpoints(workdir / layout.CHECKPOINTS, keep=keep, keep_every=keep_every)
    metadata = _metadata(config, data, teacher)
    if first is None:
        with phases.during("restore"):
            state, start = restored(checkpoints, state_like, config, data, metadata["teacher"])
            frozen = restored_base(workdir, like, mask)
            peers().arrive("after restoring")
    else:
        (state, frozen), start = first, 0
    _check_start(start, total, config, workdir)
    fixed = Fixed(frozen, teacher[1] if teacher else None)
    flops = _flops_per_token(config, data, mask, teacher)
    facts = _facts(config, data, trees.num_elements(all_params(state, fixed)), flops, total)
    # A run that goes on longer than first planned is now this config's run.
    run_id = write_files(workdir, config, facts | predicted, session(mesh, start), not resuming)
    return Training(
        config=config,
        workdir=workdir,
        cache_dir=cache_dir,
        data=data,
        mesh=mesh,
        model=model,
        objective=make_objective(config.objective, training=False),
        teacher=teacher[0] if teacher else None,
        state=state,
        fixed=fixed,
        start=start,
        total=total,
        clock=clock,
        learning_rate=jax.jit(learning_rate(config.optimizer, clock)),  # one compilation, not ten
        flops_per_token=flops,
        step=step,
        lower=lower,
        checkpoints=checkpoints,
        metadata=metadata,
        identity=f"{workdir.name}-{run_id}",
        lock=lock,
        phases=phases,
    )


def _metadata(
    config: RunConfig, data: PreparedData, teacher: tuple[Transformer, Tree] | None
) -> dict[str, Any]:
    """What every checkpoint says of its run."""
    return {
        "data": data.fingerprints(),
        "config": config.to_dict(),
        "teacher": fingerprint(teacher[1]) if teacher else "",
    }


def _check_start(start: int, total: int, config: RunConfig, workdir: epath.Path) -> None:
    if start > total:
        raise ValueError(
            f"train.duration: {config.train.duration!r} is {total} steps, but the run in "
            f"{str(workdir)!r} has done {start}"
        )


def _flops_per_token(
    config: RunConfig, data: PreparedData, mask: Tree, teacher: tuple[Transformer, Tree] | None
) -> float:
    """FLOPs of a step for one of its tokens, as the clock counts them."""
    # An objective may make longer or shorter rows of data.seq_len tokens, or two of one.
    row = next(iter(data.train.parts.values())).batch([0])
    length = row["tokens"].shape[1]
    source = row["encoder_tokens"].shape[1] if "encoder_tokens" in row else 0
    trained = {name for name, is_trained in trees.flatten(mask).items() if is_trained}
    flops = counts.flops_per_token(config.model, length, source_length=source, trained=trained)
    if teacher:  # it runs forward alone
        flops += counts.flops_per_token(teacher[0].config, length, source_length=source, trained=())
    return flops * length / config.data.seq_len


def _clock(config: RunConfig, data: PreparedData) -> tuple[Clock, int]:
    """The run's clock and its steps, among which those to be profiled must begin."""
    tokens_per_step = config.train.batch_size * config.data.seq_len
    clock = Clock(tokens_per_step, len(data.train) * config.data.seq_len)
    total = Duration.parse("train.duration", config.train.duration).steps(clock)
    profiled = config.train.profile_steps()
    if profiled and profiled.start > total:
        raise ValueError(
            f"train.profile: {config.train.profile!r} begins after the last step, {total}"
        )
    return dataclasses.replace(clock, total_steps=total), total


def _facts(config: RunConfig, data: PreparedData, num_params: int, flops: float, total: int):
    """What the receipt says of the run."""
    return {
        "data": data.description,
        "num_parameters": num_params,
        "flops_per_token": flops,
        "flops_rule": counts.FLOPS_RULE,
        "steps": total,
        "tokens": total * config.train.batch_size * config.data.seq_len,
    }


def _teacher(config: RunConfig, mesh: Mesh) -> tuple[Transformer, Tree] | None:
    if config.objective.name == "dpo":
        spec = config.objective.teacher or config.init.source
        if not spec:
            raise ValueError("objective.teacher: '' and init.source: '' leave dpo no reference")
        return load_teacher(spec, mesh, -1 if config.objective.teacher else config.init.step)
    if config.objective.name == "distillation":
        return load_teacher(config.objective.teacher, mesh)
    return None


def _first(config, model, init, where, mask, mesh, data) -> tuple[TrainState, Tree | None]:
    """The first state and the frozen parameters (None: all are trained)."""
    state = run_once(init, where, mesh)
    all_trained = all(jax.tree.leaves(mask))
    if all_trained and not config.init.source and not config.init.word_vectors:
        return state, None
    drawn = state.params
    if not all_trained:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_on_mesh(model, mesh))
        drawn = run_once(make_draw(model, config.seed), places, mesh)
    params = first_params(drawn, config, model, mesh, data)
    frozen = None
    if not all_trained:
        frozen = trees.select(params, jax.tree.map(lambda trained: not trained, mask))
    return state.replace(params=trees.select(params, mask)), frozen
