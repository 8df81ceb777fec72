"""Which parameters are trained and which are frozen, by path."""

import re

import jax

from gpt_jax import trees
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.types import Tree

_ADAPTER = re.compile(r"(^|/)lora_[ab]$")
_LAYER = re.compile(r"(^|/)layers_\d+/")
_SHOWN = 12  # names that a message lists


def trainable_mask(params: Tree, config: OptimizerConfig, lora: bool = False) -> Tree:
    """A tree of booleans over the parameters, for `trees.select` and `trees.merge`.

    All are trained, or with LoRA the adapters alone; then `config.freeze` takes out, and
    `config.train` takes back in (a new head beside frozen layers or adapters).

    Args:
      params: All parameters, arrays or shapes.
      config: Its `freeze` and `train` are regular expressions that are searched for in the names,
        also as they are when layers are stacked: "stack/layers/mlp" is the MLPs of all layers
        either way, so that model.scan is free to change.
      lora: Whether the model has adapters.

    Raises:
      ValueError: A pattern matches nothing, or names single layers where they are stacked; or
        nothing is left to train.
    """
    names = list(trees.flatten(params))
    freeze = _matches("freeze", config.freeze, names)
    train = _matches("train", config.train, names)

    def trained(name: str, _) -> bool:
        start = not lora or bool(_ADAPTER.search(name))
        return name in train or (start and name not in freeze)

    mask = trees.map_named(trained, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"optimizer.freeze: {config.freeze!r} leaves no parameter to train")
    return mask


def _matches(field: str, patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names that one of the patterns matches."""
    stacked = any("layers" in name.split("/") for name in names)
    matched: set[str] = set()
    for pattern in patterns:
        if stacked and "layers_" in pattern:
            raise ValueError(
                f"optimizer.{field}: {pattern!r} names single layers, but model.scan stacks all "
                "of them in one parameter; set model.scan=False"
            )
        found = {
            name
            for name in names
            if re.search(pattern, name) or re.search(pattern, _LAYER.sub(r"\1layers/", name))
        }
        if not found:
            more = ", ..." if len(names) > _SHOWN else ""
            raise ValueError(
                f"optimizer.{field}: {pattern!r} matches no parameter; parameters are named like "
                f"{', '.join(names[:_SHOWN])}{more}"
            )
        matched |= found
    return matched
