"""How long a run goes on, and how often it is looked at and saved.  Starts no JAX."""

import dataclasses
import math
import re

from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.runs.best import metric_mode

_MOST_PROFILED = 100  # steps: a trace holds every operation of each


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how often; durations are steps, "100M tokens", "2 epochs" or "5%" of the run.

    Attributes:
      batch_size: Sequences of the global batch.
      duration: Length of the run.
      num_microbatches: The gradient is accumulated over this many parts of a batch.
      log_every: Steps between rows of training metrics.
      eval_every: Between evaluations; one follows the last step.
      eval_batches: Validation batches (of microbatch_size) of an evaluation while training; 0: the
        whole split. The last evaluation takes the whole split, but not where the best checkpoint is
        looked for, since values over other rows do not compare.
      checkpoint_every: Between checkpoints; one follows the last step.
      keep: Newest checkpoints that are kept.
      keep_every: The first checkpoint at or after each multiple of it is kept too; "": no such.
      keep_best: Checkpoints with the best metric that are kept beside them; each evaluation is
        then followed by a checkpoint.
      metric: What "best" goes by: a name of an evaluation's row without "eval/".
      metric_mode: Whether the "min" or the "max" of it is best; "": its name says so.
      patience: The run ends after so many evaluations without a better metric; 0: never.
      sample_prompts: Texts to continue at each evaluation; "" is the beginning of a document.
      sample_tokens: Length of those continuations.
      tensorboard: Whether TensorBoard events are written.
      wandb: Weights & Biases project to log to; "": none.
      on_nonfinite: What follows a loss or gradient that is not finite, whose update is left out in
        any case: the run "halt"s; it goes on ("skip"), but not after 10 in a row; or it goes back
        to the last checkpoint and on with the batches after the one that led to it ("rewind").
      spike_sigma: A loss so many standard deviations above the mean of the last 128 is treated like
        one that is not finite; 0: none is.
      stall_timeout: Seconds that the run may be in one phase (a step, the wait for a batch, an
        evaluation, a save, the compilation) before it is ended as hanging; 0: it is not watched.
      profile: "10:13" traces steps 10, 11 and 12 and writes a table of their slowest operations to
        profile/; "": none.
    """

    batch_size: int
    duration: str | int
    num_microbatches: int = 1
    log_every: int = 10
    eval_every: str | int = "10%"
    eval_batches: int = 20
    checkpoint_every: str | int = "10%"
    keep: int = 2
    keep_every: str = ""
    keep_best: int = 0
    metric: str = "validation/loss"
    metric_mode: str = ""
    patience: int = 0
    sample_prompts: tuple[str, ...] = ("",)
    sample_tokens: int = 64
    tensorboard: bool = True
    wandb: str = ""
    on_nonfinite: str = "halt"
    spike_sigma: float = 0.0
    stall_timeout: float = 0.0
    profile: str = ""

    def __post_init__(self):
        for name in ("batch_size", "num_microbatches", "log_every", "keep", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: {getattr(self, name)!r} is not at least 1")
        for name in ("eval_batches", "keep_best", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}: {getattr(self, name)!r} is below 0")
        if self.on_nonfinite not in (policies := ("halt", "skip", "rewind")):
            raise ValueError(f"train.on_nonfinite: {self.on_nonfinite!r} is not one of {policies}")
        for name in ("spike_sigma", "stall_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name}: {getattr(self, name)!r} is not 0 or above")
        if self.keep_best or self.patience:
            metric_mode(self.metric, self.metric_mode)
        whenever = ("keep_every",) if self.keep_every else ()
        for name in ("duration", "eval_every", "checkpoint_every", *whenever):
            if not Duration.parse(f"train.{name}", getattr(self, name)).amount > 0:
                raise ValueError(f"train.{name}: {getattr(self, name)!r} is not above 0")
        if Duration.parse("train.duration", self.duration).unit == "%":
            raise ValueError(f"train.duration: {self.duration!r} is a share of itself")
        self.profile_steps()
        if self.batch_size % self.num_microbatches:
            raise ValueError(
                f"train.num_microbatches: {self.num_microbatches} does not divide "
                f"train.batch_size {self.batch_size}"
            )

    def keep_every_steps(self, clock: Clock) -> int:
        """`keep_every` in steps; 0: there is no such rule."""
        if not self.keep_every:
            return 0
        return max(1, Duration.parse("train.keep_every", self.keep_every).steps(clock))

    def profile_steps(self) -> range | None:
        """The steps that `profile` names, counted as rows count them: the first is 1."""
        if not self.profile:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if not found:
            raise ValueError(
                f"train.profile: {self.profile!r} is not FIRST:END in steps, such as '10:13' for "
                "steps 10, 11 and 12"
            )
        steps = range(int(found[1]), int(found[2]))
        if steps.start < 1 or not 1 <= len(steps) <= _MOST_PROFILED:
            raise ValueError(
                f"train.profile: {self.profile!r} is not 1 to {_MOST_PROFILED} steps, counted from "
                "1; the end is not among them"
            )
        return steps

    @property
    def microbatch_size(self) -> int:
        """Sequences that go through the model at once."""
        return self.batch_size // self.num_microbatches
