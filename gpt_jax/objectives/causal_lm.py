"""Next-token prediction by maximum likelihood."""

from gpt_jax.ops.losses import cross_entropy, is_argmax
from gpt_jax.types import Array, Batch


def causal_lm(logits_BTV: Array, batch: Batch, z_loss: float = 0.0) -> tuple[Array, dict]:
    """Sums over the batch: what is minimised, and the metrics.

    Args:
      logits_BTV: The model's output.
      batch: `targets` and `loss_mask` are read.
      z_loss: Weight of the z-loss (arXiv:2204.02311).

    Returns:
      The sum to minimise and sums by name: `loss` (negative log-likelihood in nats), `z_loss`,
      `accuracy` (targets that are the argmax). Divide by sum(loss_mask) over the global batch:
      sums over sums do not change with accumulation or sharding.
    """
    mask_BT = batch["loss_mask"]
    nll_BT, z_BT = cross_entropy(logits_BTV, batch["targets"], z_loss)
    hit_BT = is_argmax(logits_BTV, batch["targets"])
    sums = {
        "loss": (nll_BT * mask_BT).sum(),
        "z_loss": (z_BT * mask_BT).sum(),
        "accuracy": (hit_BT * mask_BT).sum(),
    }
    return sums["loss"] + sums["z_loss"], sums
