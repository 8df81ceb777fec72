"""Losses against known targets: language modelling of any kind, labels, spans, numbers.

B rows, T tokens, V vocabulary or classes. Every function gives sums over the batch, to be divided
by the objective's count over the global batch: sums over sums do not change with accumulation or
sharding.
"""

import jax.numpy as jnp

from gpt_jax.ops.losses import cross_entropy, is_argmax, label_smoothing
from gpt_jax.types import Array, Batch

# Its square is finite: in a row of padding alone the z-loss squares it, and 0 * inf is NaN.
_NEVER = -1e9


def likelihood(
    logits: Array,
    batch: Batch,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> tuple[Array, dict]:
    """Maximum likelihood of `targets`, for any number of leading dims.

    Causal, prefix, masked, permutation and infilling language models, span corruption, seq2seq
    and labels are all this function: they differ in what stands in the batch.

    Args:
      logits: f32[..., V]: [B, T, V], or [B, V] for a label of each row.
      batch: `targets` int32[...] and `loss_mask` f32[...] are read.
      smoothing: See ops.losses.label_smoothing.
      z_loss: Weight of the z-loss (arXiv:2204.02311).
      class_weights: Weight of each class, V of them, or (). What a target adds to the sum to
        minimise is multiplied by its class's weight; the divisor stays the number of targets. With
        "balanced" weights N / (V N_class) that is PyTorch's weighted mean over the whole data, and
        unlike PyTorch's it does not change with the classes that happen to share a batch.

    Returns:
      The sum to minimise and sums by name: `loss` (negative log-likelihood in nats, neither
      smoothed nor weighted, so that it compares between objectives), `z_loss`, `accuracy` (targets
      that are the argmax).

    Raises:
      ValueError: The number of class weights is not that of the classes.
    """
    mask, targets = batch["loss_mask"], batch["targets"]
    nll, z = cross_entropy(logits, targets, z_loss)
    total = nll + z
    if smoothing:
        total = total + label_smoothing(logits, targets, smoothing)
    if class_weights:
        if len(class_weights) != logits.shape[-1]:
            raise ValueError(
                f"objective.class_weights: {len(class_weights)} weights for "
                f"{logits.shape[-1]} classes"
            )
        total = total * jnp.asarray(class_weights, jnp.float32)[targets]
    sums = {
        "loss": (nll * mask).sum(),
        "z_loss": (z * mask).sum(),
        "accuracy": (is_argmax(logits, targets) * mask).sum(),
    }
    return (total * mask).sum(), sums


def span(logits_BT2: Array, batch: Batch) -> tuple[Array, dict]:
    """First and last token of an answer, each a choice among the tokens (arXiv:1810.04805, 4.2).

    Args:
      logits_BT2: f32[B, T, 2], of being the first and the last token.
      batch: `targets` int32[B, 2], `loss_mask` f32[B, 2] and `segment_ids` int32[B, T], whose
        padding (0) gets no probability.

    Returns:
      As `likelihood`; `accuracy` counts first and last tokens one by one.
    """
    is_token_BT1 = (batch["segment_ids"] > 0)[..., None]
    logits_B2T = jnp.where(is_token_BT1, logits_BT2, _NEVER).swapaxes(1, 2)
    return likelihood(logits_B2T, batch)


def regression(outputs_B1: Array, batch: Batch) -> tuple[Array, dict]:
    """Squared error.

    Args:
      outputs_B1: f32[B, 1].
      batch: `targets` f32[B] and `loss_mask` f32[B] are read.

    Returns:
      The sum to minimise and sums by name: `loss` (squared error), `absolute_error`.
    """
    assert outputs_B1.shape[-1] == 1, outputs_B1.shape
    mask_B = batch["loss_mask"]
    error_B = outputs_B1[..., 0].astype(jnp.float32) - batch["targets"]
    loss = (jnp.square(error_B) * mask_B).sum()
    return loss, {"loss": loss, "absolute_error": (jnp.abs(error_B) * mask_B).sum()}
