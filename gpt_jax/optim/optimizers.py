"""Optimizers as optax chains; which parameter gets what goes by its path."""

import dataclasses
import re
from collections.abc import Callable

import jax
import optax
from optax import contrib

from gpt_jax import trees
from gpt_jax.optim import schedules
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.types import Array, Tree

# Which axes of a weight Muon takes as rows and columns, from the end: a leading axis of stacked
# layers is a batch of matrices. What matches nothing is left to Adam.
_MUON_AXES = {
    r"attention/(q|k|v)/kernel$": ((-3,), (-2, -1)),
    r"attention/out/kernel$": ((-3, -2), (-1,)),
    r"mlp/(up|gate|down)/kernel$": ((-2,), (-1,)),
}
# Weight decay is for matrices: norms, biases and learned positions are left out.
_NO_DECAY = (r"/scale$", r"/bias$", r"(^|/)positions$")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    Attributes:
      name: "adamw" (arXiv:1711.05101), "adam", or "muon" (https://kellerjordan.github.io/posts/muon)
        for the matrices of the layers with AdamW for the rest.
      learning_rate: Peak rate of Adam.
      muon_learning_rate: Peak rate of Muon; the update of a matrix [in, out] is scaled by
        sqrt(max(1, out / in)).
      schedule: "constant", "linear", "cosine" or "wsd".
      warmup: Duration of the linear rise.
      decay: Duration of the fall of "wsd".
      final: Rate at the last step over the peak rate.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of Adam's second moment.
      momentum: Decay of Muon's momentum (Nesterov).
      weight_decay: Decoupled, times the learning rate; "adam" has none.
      clip_norm: Largest global norm of the gradient; 0: no clipping.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    muon_learning_rate: float = 0.02
    schedule: str = "cosine"
    warmup: str | int = "2%"
    decay: str | int = "20%"
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.name not in ("adamw", "adam", "muon"):
            raise ValueError(f"optimizer.name: {self.name!r} is not one of adamw, adam, muon")
        if self.schedule not in schedules.NAMES:
            allowed = ", ".join(schedules.NAMES)
            raise ValueError(f"optimizer.schedule: {self.schedule!r} is not one of {allowed}")
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)!r} is not above 0")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)!r} is not in [0, 1)")
        for name in ("final", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)!r} is below 0")
        for name in ("warmup", "decay"):
            Duration.parse(f"optimizer.{name}", getattr(self, name))


def learning_rate(config: OptimizerConfig, clock: Clock) -> Callable[[Array | int], Array]:
    """Adam's learning rate as a function of the step; Muon's is proportional to it."""
    return schedules.make_schedule(
        config.schedule,
        peak=config.learning_rate,
        final=config.final * config.learning_rate,
        warmup=Duration.parse("optimizer.warmup", config.warmup).steps(clock),
        decay=Duration.parse("optimizer.decay", config.decay).steps(clock),
        total=clock.total_steps,
    )


def make_optimizer(config: OptimizerConfig, clock: Clock) -> optax.GradientTransformation:
    """The optax chain: clipping, then the named optimizer with its schedule."""
    rate = learning_rate(config, clock)
    decay_mask = _decay_mask if config.weight_decay else None
    if config.name == "muon":
        ratio = config.muon_learning_rate / config.learning_rate
        update = contrib.muon(
            learning_rate=lambda step: ratio * rate(step),
            adam_learning_rate=rate,
            beta=config.momentum,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            muon_weight_dimension_numbers=_muon_axes,
        )
    else:
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay if config.name == "adamw" else 0.0,
            mask=decay_mask,
        )
    if not config.clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _decay_mask(params: Tree) -> Tree:
    return jax.tree.map(lambda excluded: not excluded, trees.match(_NO_DECAY, params))


def _muon_axes(params: Tree) -> Tree:
    def axes(name: str, _) -> contrib.MuonDimensionNumbers | None:
        for pattern, (rows, columns) in _MUON_AXES.items():
            if re.search(pattern, name):
                return contrib.MuonDimensionNumbers(rows, columns)
        return None

    return trees.map_named(axes, params)
