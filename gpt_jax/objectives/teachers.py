"""Losses against the outputs of other parameters on the same batch, `teacher_logits`.

B rows, T tokens, V vocabulary or classes. Sums over the batch, as in likelihood.py.
"""

import jax
import jax.numpy as jnp

from gpt_jax.objectives.likelihood import likelihood
from gpt_jax.ops.losses import cross_entropy
from gpt_jax.types import Array, Batch


def distillation(
    logits: Array,
    batch: Batch,
    *,
    temperature: float = 1.0,
    teacher_weight: float = 0.5,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, dict]:
    """The targets' loss and the teacher's, mixed (arXiv:1503.02531, section 2).

    The teacher's loss of a target is t^2 KL(softmax(teacher / t) || softmax(student / t)). The
    factor t^2 keeps its gradient about as large as the other's, which falls with 1 / t^2.

    Args:
      logits: f32[..., V], the student's.
      batch: `targets`, `loss_mask` and `teacher_logits` f32[..., V] are read.
      temperature: t.
      teacher_weight: w in (1 - w) * targets' loss + w * teacher's loss.
      smoothing: Of the targets' loss; see `likelihood`.
      z_loss: Likewise.

    Returns:
      The sum to minimise and the sums of `likelihood`, with `teacher_loss`: the KL times t^2.

    Raises:
      ValueError: The teacher's outputs have another shape.
    """
    _check_teacher(logits, batch)
    hard, sums = likelihood(logits, batch, smoothing=smoothing, z_loss=z_loss)
    teacher = jax.lax.stop_gradient(batch["teacher_logits"]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    # A class that the teacher rules out, with a logit of -inf, adds 0, not 0 * inf.
    p = jnp.exp(log_p)
    kl = jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    soft = temperature**2 * (kl * batch["loss_mask"]).sum()
    total = (1.0 - teacher_weight) * hard + teacher_weight * soft
    return total, {**sums, "teacher_loss": soft}


def dpo(logits_BTV: Array, batch: Batch, *, beta: float = 0.1) -> tuple[Array, dict]:
    """Direct preference optimisation (arXiv:2305.18290, equation 7).

    A row holds a pair: segment 1 is the prompt with the chosen completion, segment 2 the prompt
    with the rejected one; `loss_mask` marks the completions' targets. A completion's reward is
    beta (log p(completion) - log p_reference(completion)), the margin of a pair is the chosen's
    reward less the rejected's, and its loss is -log sigmoid(margin).

    Args:
      logits_BTV: f32[B, T, V].
      batch: `targets`, `loss_mask`, `segment_ids` [B, T] and `teacher_logits` f32[B, T, V], the
        reference model's, are read. Rows without a target in both segments do not count.
      beta: Strength of the pull to the reference model.

    Returns:
      The sum to minimise and sums over the pairs, to be divided by `count_pairs`: `loss`,
      `accuracy` (pairs with a margin above 0), `margin`, `chosen_reward`, `rejected_reward`.

    Raises:
      ValueError: The reference model's outputs have another shape.
    """
    _check_teacher(logits_BTV, batch)
    reference_BTV = jax.lax.stop_gradient(batch["teacher_logits"])
    nll_BT = cross_entropy(logits_BTV, batch["targets"])[0]
    reference_nll_BT = cross_entropy(reference_BTV, batch["targets"])[0]
    reward_BT = beta * (reference_nll_BT - nll_BT) * batch["loss_mask"]
    chosen_B, rejected_B = (
        (reward_BT * (batch["segment_ids"] == segment)).sum(-1) for segment in (1, 2)
    )
    pair_B = _has_pair(batch)
    margin_B = chosen_B - rejected_B
    sums = {
        "loss": (-jax.nn.log_sigmoid(margin_B) * pair_B).sum(),
        "accuracy": ((margin_B > 0) * pair_B).sum(),
        "margin": (margin_B * pair_B).sum(),
        "chosen_reward": (chosen_B * pair_B).sum(),
        "rejected_reward": (rejected_B * pair_B).sum(),
    }
    return sums["loss"], sums


def count_pairs(batch: Batch) -> Array:
    """Rows that hold a pair, f32: what the sums of `dpo` are to be divided by."""
    return _has_pair(batch).sum()


def _has_pair(batch: Batch) -> Array:
    counted_BT = batch["loss_mask"] > 0
    chosen_B, rejected_B = (
        (counted_BT & (batch["segment_ids"] == segment)).any(-1) for segment in (1, 2)
    )
    return (chosen_B & rejected_B).astype(jnp.float32)


def _check_teacher(logits: Array, batch: Batch):
    theirs, ours = batch["teacher_logits"].shape, logits.shape
    if theirs != ours:
        raise ValueError(
            f"objective.teacher: its outputs are {list(theirs)}, the model's {list(ours)}; "
            "both need one vocabulary and one kind of head"
        )
