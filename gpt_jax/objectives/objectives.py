"""From a config to what the step minimises."""

import dataclasses
import functools
from collections.abc import Callable

from gpt_jax.objectives.config import WITH_TEACHER, ObjectiveConfig
from gpt_jax.objectives.likelihood import likelihood, regression, span
from gpt_jax.objectives.teachers import count_pairs, distillation, dpo
from gpt_jax.types import Array, Batch

# The objectives that are maximum likelihood of `targets`, told apart by their rows alone.
_LIKELIHOODS = (
    "causal_lm",
    "prefix_lm",
    "masked_lm",
    "span_corruption",
    "permutation_lm",
    "fill_in_the_middle",
    "seq2seq",
    "labels",
)


def count_targets(batch: Batch) -> Array:
    """Targets that count, f32."""
    return batch["loss_mask"].sum()


@dataclasses.dataclass(frozen=True)
class Objective:
    """What to minimise.

    Attributes:
      loss: (outputs, batch) -> (the sum to minimise, sums of metrics by name); `loss` is always
        among them.
      count: batch -> what those sums are to be divided by, over the global batch.
      needs_teacher: Whether the batch must hold `teacher_logits`.
    """

    loss: Callable[[Array, Batch], tuple[Array, dict]]
    count: Callable[[Batch], Array] = count_targets
    needs_teacher: bool = False


def make_objective(config: ObjectiveConfig, *, training: bool = True) -> Objective:
    """The objective that a config names.

    Args:
      config: Its name and settings.
      training: False: for held-out data. Distillation is then the targets' loss alone, so that a
        student is judged without its teacher; the others are the same.
    """
    smooth = {"smoothing": config.label_smoothing, "z_loss": config.z_loss}
    by_targets = functools.partial(likelihood, **smooth, class_weights=config.class_weights)
    by_teacher = functools.partial(
        distillation,
        temperature=config.temperature,
        teacher_weight=config.teacher_weight,
        **smooth,
    )
    name = config.name if training or config.name != "distillation" else "causal_lm"
    table = {
        **dict.fromkeys(_LIKELIHOODS, by_targets),
        "span": span,
        "regression": regression,
        "distillation": by_teacher,
        "dpo": functools.partial(dpo, beta=config.beta),
    }
    count = count_pairs if name == "dpo" else count_targets
    return Objective(table[name], count, name in WITH_TEACHER)
