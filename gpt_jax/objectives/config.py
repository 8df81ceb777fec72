"""What a run minimises, and how its rows are corrupted for it.  Starts no JAX."""

import dataclasses
import math

# The fields beside `name` that each objective reads.
_LIKELIHOOD = ("label_smoothing", "z_loss")
READS = {
    "causal_lm": _LIKELIHOOD,
    "prefix_lm": _LIKELIHOOD,
    "masked_lm": (*_LIKELIHOOD, "mask_rate", "mask_share", "random_share"),
    "span_corruption": (*_LIKELIHOOD, "mask_rate", "mean_span"),
    "permutation_lm": (*_LIKELIHOOD, "predict_share"),
    "fill_in_the_middle": (*_LIKELIHOOD, "fim_rate", "fim_spm_rate"),
    "seq2seq": _LIKELIHOOD,
    "labels": (*_LIKELIHOOD, "class_weights"),
    "span": (),
    "regression": (),
    "distillation": (*_LIKELIHOOD, "teacher", "temperature", "teacher_weight"),
    "dpo": ("teacher", "beta"),
}
# Objectives that compare with the outputs of other parameters on the same batch.
WITH_TEACHER = ("distillation", "dpo")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """An objective and its settings.

    Attributes:
      name: "causal_lm"; "prefix_lm" (arXiv:1910.10683, section 3.2); "masked_lm"
        (arXiv:1810.04805); "span_corruption" (arXiv:1910.10683); "permutation_lm"
        (arXiv:1906.08237); "fill_in_the_middle" (arXiv:2207.14255); "seq2seq"; "labels" (classes
        of rows or tokens); "span" (first and last token of an answer); "regression";
        "distillation" (arXiv:1503.02531); "dpo" (arXiv:2305.18290).
      label_smoothing: Share of a target's probability that is spread over all classes
        (arXiv:1512.00567, section 7; 0.1 in arXiv:1706.03762).
      z_loss: Weight of the z-loss (arXiv:2204.02311, which uses 1e-4).
      mask_rate: Share of the tokens that are to be predicted: masked_lm, span_corruption.
      mask_share: Of those, the share that becomes the mask token: masked_lm.
      random_share: Of those, the share that becomes a random token; the rest stays: masked_lm.
      mean_span: Mean length of a removed span in tokens: span_corruption.
      predict_share: Share of a row that is predicted, the last of its order: permutation_lm
        (XLNet's 1 / K with K = 6).
      fim_rate: Share of the documents that are rearranged: fill_in_the_middle.
      fim_spm_rate: Of those, the share with the suffix before the prefix: fill_in_the_middle.
      class_weights: Weight of each class's loss; (): all 1: labels.
      teacher: A run directory or "hf:DIR". distillation needs one; for dpo it is the reference
        model, and "" means the initial parameters.
      temperature: Of teacher and student: distillation.
      teacher_weight: Weight of the teacher's loss; the targets' has the rest: distillation.
      beta: Strength of the pull to the reference model: dpo.

    Raises:
      ValueError: A value is out of range, or set though the objective does not read it; the
        message names the field and the value.
    """

    name: str = "causal_lm"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    mask_rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    mean_span: float = 3.0
    predict_share: float = 1 / 6
    fim_rate: float = 0.5
    fim_spm_rate: float = 0.5
    class_weights: tuple[float, ...] = ()
    teacher: str = ""
    temperature: float = 1.0
    teacher_weight: float = 0.5
    beta: float = 0.1

    def __post_init__(self):
        if self.name not in READS:
            raise ValueError(f"objective.name: {self.name!r} is not one of {', '.join(READS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            unread = field.name != "name" and field.name not in READS[self.name]
            if unread and value != field.default:
                raise ValueError(
                    f"objective.{field.name}: {value!r} is not read by objective.name "
                    f"{self.name!r}; leave it at {field.default!r}"
                )
        for name in ("mask_rate", "predict_share"):
            self._check(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        for name in ("mask_share", "random_share", "fim_rate", "fim_spm_rate", "teacher_weight"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        for name in ("temperature", "beta"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        self._check("z_loss", 0 <= self.z_loss < math.inf, "a number of at least 0")
        self._check("mean_span", 1 <= self.mean_span < math.inf, "a number of at least 1")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"objective.random_share: {self.random_share} and objective.mask_share "
                f"{self.mask_share} are more than 1 together"
            )
        weights = self.class_weights
        good = all(0 <= weight < math.inf for weight in weights) and (any(weights) or not weights)
        self._check("class_weights", good, "numbers of at least 0, not all of them 0")
        if self.name == "distillation" and not self.teacher:
            raise ValueError("objective.teacher: '' names no teacher; give a run or hf:DIR")

    def _check(self, name: str, good: bool, wanted: str):
        if not good:
            raise ValueError(f"objective.{name}: {getattr(self, name)!r} is not {wanted}")
