"""Cross-entropy in f32, the z-loss of PaLM (arXiv:2204.02311, section 5), label smoothing."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gpt_jax.types import Array

# A reduction over more numbers than this XLA:CPU leaves to one core.
_MOST_FOR_ALL_CORES = 32768


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits_BTV: Array, targets_BT: Array, z_loss: float = 0.0) -> tuple[Array, Array]:
    """Negative log-likelihood of the targets and the z-loss term, f32[B, T] each.

    The second is z_loss * logsumexp(logits)^2. The gradient flows from both; the backward pass
    rebuilds the softmax from the logits and their logsumexp, so that no second [B, T, V] is kept.
    """
    return _cross_entropy_fwd(logits_BTV, targets_BT, z_loss)[0]


def _cross_entropy_fwd(logits_BTV, targets_BT, z_loss):
    logits = logits_BTV.astype(jnp.float32)
    lse_BT = _logsumexp(logits)
    target_BT = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    losses = lse_BT - target_BT, z_loss * jnp.square(lse_BT)
    return losses, (logits_BTV, targets_BT, lse_BT)


def _logsumexp(logits_BTV: Array) -> Array:
    """jax.nn.logsumexp over the vocabulary, f32[B, T]; on CPU in parts where it is large."""
    *lead, V = logits_BTV.shape
    least = -(-V // _MOST_FOR_ALL_CORES)
    # GPT-2's 50,257 is 29 parts. What none of 64 numbers divides stays whole: more parts would
    # leave little to sum in each.
    parts = next((n for n in range(least, least + 64) if V % n == 0), 1)
    whole = functools.partial(jax.nn.logsumexp, axis=-1)
    if parts == 1 or jax.sharding.get_abstract_mesh().size > 1:  # devices may share the vocabulary
        return whole(logits_BTV)
    return lax.platform_dependent(
        logits_BTV, cpu=lambda x: whole(whole(x.reshape(*lead, parts, -1))), default=whole
    )


def _cross_entropy_bwd(z_loss, residuals, cotangents):
    logits_BTV, targets_BT, lse_BT = residuals
    g_nll, g_z = cotangents
    probabilities = jnp.exp(logits_BTV.astype(jnp.float32) - lse_BT[..., None])
    is_target = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    on_probabilities = g_nll + g_z * (2.0 * z_loss) * lse_BT
    grad = probabilities * on_probabilities[..., None] - jnp.where(is_target, g_nll[..., None], 0.0)
    return grad.astype(logits_BTV.dtype), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def label_smoothing(logits_BTV: Array, targets_BT: Array, amount: float) -> Array:
    """What smoothing adds to the negative log-likelihood, f32[B, T] (arXiv:1512.00567, section 7).

    Cross-entropy against (1 - amount) on the target plus amount / V on every class is
    lse(x) - (1 - amount) x_target - amount mean(x), so the addend is amount (x_target - mean(x)):
    linear in the logits, hence nothing is kept for its gradient. Negative if the target is
    unlikely enough; the sum with the negative log-likelihood is not.
    """
    logits = logits_BTV.astype(jnp.float32)
    # A select, not a gather: its transpose fuses with the gradient of the cross-entropy.
    is_target = jnp.arange(logits.shape[-1]) == targets_BT[..., None]
    return amount * (jnp.where(is_target, logits, 0.0).sum(-1) - logits.mean(-1))


def is_argmax(logits_BTV: Array, targets_BT: Array) -> Array:
    """argmax(logits) == targets, bool[B, T]; among equal logits the first counts, as in argmax.

    It counts the logits that come before the target: XLA:CPU fuses that into one loop over the
    logits, while its argmax takes seven times as long as their logsumexp (docs/speed.md).
    """
    target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    earlier = jnp.arange(logits_BTV.shape[-1]) < targets_BT[..., None]
    ahead = (logits_BTV > target_BT1) | ((logits_BTV == target_BT1) & earlier)
    # Beside a NaN nothing is a hit.
    return ~(ahead | jnp.isnan(logits_BTV)).any(axis=-1)
