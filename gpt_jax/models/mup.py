"""The standard parametrisation of a trained muP model: its multipliers become part of its weights.

Other libraries have no field for them (convert.export_run).
"""

import dataclasses
import re

from gpt_jax import trees
from gpt_jax.models.config import TransformerConfig
from gpt_jax.types import Tree

# What writes to the residual stream.
_RESIDUAL = re.compile(r"^stack/.*(attention/out|mlp/down)/(kernel|bias)$")
# Head -> what is linear in its logits and in nothing else: before a tied head, the norm.
_BEFORE_LOGITS = {
    "lm": r"^final_norm/(scale|bias)$",
    "mlm": r"^mlm/norm/(scale|bias)$",
    "sequence": r"^classifier/kernel$",
    "tokens": r"^classifier/kernel$",
    "span": r"^classifier/kernel$",
    "none": r"$^",
}


def fold_mup(config: TransformerConfig, params: Tree) -> tuple[TransformerConfig, Tree]:
    """The same model in the standard parametrisation.

    Logits over m_d become a norm or a classifier over m_d, sublayers over m_L their projections
    over m_L, and the scale of attention another score_width.

    Args:
      config: The model's, without adapters (models.lora.merge_lora).
      params: Its parameters.

    Returns:
      The config with all model.mup_ fields 0, and its parameters.

    Raises:
      ValueError: It has no such form: no norm before a tied head, or no whole score_width.
    """
    c = config
    assert not c.lora_rank, "adapters are merged first"
    folded = dataclasses.replace(
        c, mup_base_width=0, mup_base_head_dim=0, mup_base_layers=0, score_width=_score_width(c)
    )
    if c.width_multiplier == c.depth_multiplier == 1:
        return folded, params
    if c.width_multiplier != 1 and c.head == "lm" and c.norm_order == "post":
        raise ValueError(
            f"model.mup_base_width: {c.mup_base_width} divides logits, which only a norm before "
            "the head could do instead, and model.norm_order 'post' has none"
        )
    before_logits = re.compile(_BEFORE_LOGITS[c.head])

    def divided(name: str, leaf):
        if _RESIDUAL.search(name):
            return leaf / c.depth_multiplier
        if before_logits.search(name):
            # Gemma's norm multiplies by 1 + scale.
            one = c.norm == "rmsnorm_plus_one" and name.endswith("/scale")
            return (one + leaf) / c.width_multiplier - one
        return leaf

    return folded, trees.map_named(divided, params)


def _score_width(c: TransformerConfig) -> int:
    """The score_width with which scores are multiplied by the same."""
    if c.mup_base_head_dim in (0, c.head_dim):
        return c.score_width
    width, rest = divmod(c.head_dim**2, c.mup_base_head_dim)
    if rest:
        raise ValueError(
            f"model.mup_base_head_dim: {c.mup_base_head_dim} does not divide {c.head_dim}^2: no "
            "model.score_width is the same scale of attention"
        )
    return width
