"""What muP and CompleteP change in the optimizer (arXiv:2203.03466; arXiv:2505.01618, table 1).

For a model that is m_d times as wide and m_L times as deep as its base, with Adam:

| parameter | rate | weight decay | eps |
|---|---|---|---|
| hidden matrices | 1 / m_d | m_d | 1 / (m_d m_L) |
| norms and biases of the layers | 1 | 1 | 1 / (m_d m_L) |
| embeddings, heads, final norm | 1 | 1 | 1 / m_d |

Weight decay here is decoupled and times the rate, so that rate / m_d with decay times m_d is the
base's own decay of a weight: it is added after the division.  Adam's update is g / (|g| + eps) in
size: instead of dividing eps, gradients are multiplied, since m_d g / (m_d |g| + eps) is the same.

Muon's matrices keep their rate.  Its update has a spectral norm of about sqrt(max(1, out / in))
whatever the width, and a hidden matrix moves its outputs by as much at every width if the spectral
norm of its update goes like sqrt(out / in) (arXiv:2310.17813).  Adam's update has entries of size
1 instead, and since they add up along the input, its spectral norm grows with the width.
"""

import dataclasses
import math

import jax
import optax

from gpt_jax import trees
from gpt_jax.types import Tree

# Matrices whose input grows with the width and whose output does too, or is summed over it: those
# of the layers, the dense layers before a head, and a LoRA adapter's first factor [in, R]. Its
# second one, [R, out], is like an embedding, and keeps its rate.
_OF_LAYERS = r"(attention/(q|k|v|out)|mlp/(up|gate|down))/kernel$"
_OTHERS = (r"^(mlm/dense|pooler)/kernel$", r"/lora_a$")
_IN_LAYERS = r"^(stack|encoder)/"


@dataclasses.dataclass(frozen=True)
class WidthScaling:
    """How many times wider and deeper a model is than the base whose rates it takes.

    Attributes:
      width: m_d, model.embed_dim over model.mup_base_width.
      depth: m_L, model.num_layers over model.mup_base_layers.
    """

    width: float = 1.0
    depth: float = 1.0

    def __post_init__(self):
        for name in ("width", "depth"):
            value = getattr(self, name)
            assert math.isfinite(value) and value > 0, (name, value)


STANDARD = WidthScaling()


def scale_gradients(scaling: WidthScaling) -> optax.GradientTransformation:
    """Multiplies gradients by as much as eps is to be divided by."""
    in_layers = scaling.width * scaling.depth
    return _scale_by_name(
        lambda tree: jax.tree.map(
            lambda inside: in_layers if inside else scaling.width, trees.match([_IN_LAYERS], tree)
        )
    )


def scale_rates(scaling: WidthScaling, muon: bool = False) -> optax.GradientTransformation:
    """Divides the updates of hidden matrices by m_d.

    Args:
      scaling: By how much.
      muon: The matrices of the layers are Muon's, and keep their rate.
    """
    hidden = _OTHERS if muon else (_OF_LAYERS, *_OTHERS)
    return _scale_by_name(
        lambda tree: jax.tree.map(
            lambda is_hidden: 1 / scaling.width if is_hidden else 1.0, trees.match(hidden, tree)
        )
    )


def _scale_by_name(factors_of) -> optax.GradientTransformation:
    """Multiplies each leaf by its factor; has no state."""

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None):
        del params
        return jax.tree.map(lambda u, factor: u * factor, updates, factors_of(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
