"""Optimizers as optax chains; which parameter gets what goes by its path."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gpt_jax import trees
from gpt_jax.optim import schedules
from gpt_jax.optim.adam import scale_by_adam
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.optim.layer_decay import scale_by_layer
from gpt_jax.optim.muon import muon
from gpt_jax.optim.width_scaling import STANDARD, WidthScaling, scale_gradients, scale_rates
from gpt_jax.types import Array, Tree

# Which axes of a weight Muon takes as rows and columns, from the end: a leading axis of stacked
# layers is a batch of matrices. What matches nothing is left to Adam: embeddings, heads (poolers
# and the dense layer of a masked language model too, which belong to the head) and adapters, whose
# two factors share one matrix's scale and start far apart in size.
_MUON_AXES = {
    r"attention/(q|k|v)/kernel$": ((-3,), (-2, -1)),
    r"attention/out/kernel$": ((-3, -2), (-1,)),
    r"mlp/(up|gate|down)/kernel$": ((-2,), (-1,)),
}
# Weight decay is for matrices: left out are norms, biases (the tables of relative ones too), and
# what is added to the embedding of every token, learned positions and token types.
_NO_DECAY = (r"/scale$", r"/bias$", r"^(token_types|(encoder_)?(positions|relative))$")


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


def make_optimizer(
    config: OptimizerConfig, clock: Clock, scaling: WidthScaling = STANDARD
) -> optax.GradientTransformation:
    """The optax chain: clipping, the named optimizer with its schedule, the rates of the layers.

    Parameters that are None (trees.select) are frozen: they have no slots and no updates.

    Args:
      config: The optimizer's.
      clock: Of the run.
      scaling: How much wider and deeper the model is than that of config.learning_rate and
        config.eps (muP); (1, 1) in the standard parametrisation.
    """
    scaled = scaling != STANDARD
    rate = learning_rate(config, clock)
    decay_mask = _decay_mask if config.weight_decay else None
    if config.name == "muon":
        ratio = config.muon_learning_rate / config.learning_rate
        update = muon(
            lambda step: ratio * rate(step),
            rate,
            _muon_axes,
            beta=config.momentum,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            decay_mask=decay_mask,
        )
    else:
        weight_decay = config.weight_decay if config.name == "adamw" else 0.0
        update = optax.chain(
            scale_by_adam(config.b1, config.b2, config.eps),
            # Before the decay, which muP keeps: a rate over m with a decay times m.
            *([scale_rates(scaling)] if scaled else []),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    chain = [scale_gradients(scaling), update] if scaled else [update]
    if scaled and config.name == "muon":
        chain.append(scale_rates(scaling, muon=True))
    if config.clip_norm:
        chain.insert(0, _clip_by_global_norm(config.clip_norm))
    if config.layer_decay != 1:
        chain.append(scale_by_layer(config.layer_decay))
    return optax.chain(*chain) if len(chain) > 1 else update


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients of a norm above `max_norm` are scaled to it.

    By one factor: optax divides each gradient by the norm, and XLA keeps a quotient that several
    read as an array of its own, so a second copy of the gradients.
    """

    def scale(grads: Tree, _: Tree) -> Tree:
        norm = optax.global_norm(grads)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(scale)


def _decay_mask(params: Tree) -> Tree:
    return jax.tree.map(lambda excluded: not excluded, trees.match(_NO_DECAY, params))


def _muon_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    found = (axes for pattern, axes in _MUON_AXES.items() if re.search(pattern, name))
    return next(found, None)
