"""What an optimizer is made of: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses
import re

from gpt_jax.optim.durations import Duration

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    Attributes:
      name: "adamw" (arXiv:1711.05101), "adam", or "muon" (https://kellerjordan.github.io/posts/muon)
        for the matrices of the layers with AdamW for the rest.
      learning_rate: Peak rate of Adam; with model.mup_base_width that of a model of the base's
        width, as eps is then (optim.width_scaling).
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
      weight_decay: Decoupled, times the learning rate; "adam" has none, and "muon" decays its
        matrices alone, not embeddings and head.
      clip_norm: Largest global norm of the gradient; 0: no clipping.
      freeze: Regular expressions; parameters in whose name one occurs are not trained, and have no
        slots in the optimizer ("^tokens", "stack/layers_[0-3]/").
      train: Regular expressions of parameters that are trained although frozen or, with LoRA, no
        part of an adapter ("^classifier").
      layer_decay: The learning rate of layer i of L is multiplied with
        layer_decay ** (L - i), that of the embeddings with layer_decay ** (L + 1); 1: equal rates.
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
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self):
        if self.name not in ("adamw", "adam", "muon"):
            raise ValueError(f"optimizer.name: {self.name!r} is not one of adamw, adam, muon")
        if self.schedule not in SCHEDULES:
            allowed = ", ".join(SCHEDULES)
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
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay: {self.layer_decay!r} is not in (0, 1]")
        for name in ("freeze", "train"):
            for pattern in getattr(self, name):
                _check_pattern(f"optimizer.{name}", pattern)
        for name in ("warmup", "decay"):
            Duration.parse(f"optimizer.{name}", getattr(self, name))


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from None
