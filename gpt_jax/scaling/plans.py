"""Which sizes to train for a law: isoFLOP budgets and ladders, as overrides.  Starts no JAX.

  isoflop(model, [1e11, 3e11, 1e12], batch_size=8)     # six sizes a budget around the guess
  ladder(model, [2e4, 6e4, 2e5], tokens_per_param=20, batch_size=8)

Sizes and FLOPs are counted by scaling.counts: N without embeddings but with the head, C by
counts.FLOPS_RULE. Runs of a sweep may be such overrides (scaling/grids.py).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gpt_jax.models.config import TransformerConfig
from gpt_jax.scaling import counts

ASPECT = (16, 32)  # width over layers
HEAD_DIM = (16, 32)
_WIDTH_STEP = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: what to override, and what it counts."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_params: int  # counts.num_parameters without embeddings
    flops_per_token: float

    @property
    def overrides(self) -> dict[str, int]:
        return {
            "model.num_layers": self.num_layers,
            "model.embed_dim": self.embed_dim,
            "model.num_heads": self.num_heads,
        }


def shapes(
    model: Mapping[str, Any], max_params: float, aspect: tuple[float, float] = ASPECT
) -> list[Shape]:
    """Every shape up to a size, from the smallest on: widths in steps of 8, heads 16 to 32 wide.

    Args:
      model: The model section of a config; its seq_len is that of the rows. Widths that depend on
        embed_dim (mlp_dim, head_dim) must be left to their defaults.
      max_params: Non-embedding.
      aspect: Least and largest embed_dim / num_layers.
    """
    found = []
    width, smallest = 2 * _WIDTH_STEP, 0.0
    while smallest <= max_params:
        layers = range(math.ceil(width / aspect[1]), math.floor(width / aspect[0]) + 1)
        of_width = [_shape(model, number, width) for number in layers if number > 0]
        found += [shape for shape in of_width if shape.num_params <= max_params]
        smallest = min((shape.num_params for shape in of_width), default=smallest)
        width += _WIDTH_STEP
    return sorted(found, key=lambda shape: (shape.num_params, shape.num_layers))


def _shape(model: Mapping[str, Any], num_layers: int, width: int) -> Shape:
    fitting = [h for h in range(1, width) if width % h == 0 and not (width // h) % 2]
    middle = math.sqrt(math.prod(HEAD_DIM))
    num_heads = min(fitting, key=lambda heads: abs(math.log(width / heads / middle)))
    config = TransformerConfig(
        **{**model, "num_layers": num_layers, "embed_dim": width, "num_heads": num_heads}
    )
    return Shape(
        num_layers,
        width,
        num_heads,
        counts.num_parameters(config, embeddings=False),
        counts.flops_per_token(config, config.seq_len),
    )


def near(candidates: Iterable[Shape], num_params: float) -> Shape:
    """The shape whose size is nearest, as a ratio."""
    return min(candidates, key=lambda shape: abs(math.log(shape.num_params / num_params)))


def chinchilla_guess(tokens_per_param: float = 20.0) -> Callable[[float], float]:
    """The best size for a budget if 6 N D = C and D / N is constant."""
    return lambda flops: math.sqrt(flops / 6 / tokens_per_param)


def isoflop(
    model: Mapping[str, Any],
    budgets: Iterable[float],
    *,
    batch_size: int,
    num_sizes: int = 6,
    spread: float = 6.0,
    guess: Callable[[float], float] | None = None,
    aspect: tuple[float, float] = ASPECT,
) -> list[dict[str, Any]]:
    """Different sizes of equal cost for each budget.

    Args:
      model: The model section of a config.
      budgets: FLOPs of a run.
      batch_size: Rows of model["seq_len"] tokens a step.
      num_sizes: Sizes a budget, evenly on a log scale.
      spread: The smallest and largest are so many times below and above the guess.
      guess: From a budget to its best size; None: 20 tokens a parameter. A law's
        `lambda c: law.optimum(c)[0]` is a better one after the first budgets.
      aspect: Of width to layers.

    Returns:
      Overrides of model.num_layers, embed_dim and num_heads, train.duration in steps, and the
      budget as group.

    Raises:
      ValueError: A budget too small for that many different sizes, or for one step.
    """
    guess = guess or chinchilla_guess()
    runs = []
    for flops in budgets:
        middle = float(guess(flops))
        candidates = shapes(model, middle * spread * 1.5, aspect)
        ratios = [spread ** (2 * i / max(num_sizes - 1, 1) - 1) for i in range(num_sizes)]
        if num_sizes == 1:
            ratios = [1.0]
        chosen = []
        for ratio in ratios:
            free = [shape for shape in candidates if shape not in chosen]
            if not free:
                break
            chosen.append(near(free, middle * ratio))
        if len({shape.num_params for shape in chosen}) < num_sizes:
            raise ValueError(
                f"budgets: {flops:g} FLOPs around {middle:.3g} parameters have {len(chosen)} of "
                f"{num_sizes} shapes; take a larger budget, fewer sizes, or a wider aspect"
            )
        chosen.sort(key=lambda shape: shape.num_params)
        runs += [_run(shape, flops, model, batch_size, f"{flops:g}") for shape in chosen]
    return runs


def ladder(
    model: Mapping[str, Any],
    sizes: Iterable[float],
    *,
    tokens_per_param: float,
    batch_size: int,
    aspect: tuple[float, float] = ASPECT,
) -> list[dict[str, Any]]:
    """Growing sizes, each with the same number of tokens a parameter (non-embedding)."""
    sizes = list(sizes)
    candidates = shapes(model, 1.5 * max(sizes), aspect)
    chosen = [near(candidates, size) for size in sizes]
    return [
        _run(
            shape,
            shape.flops_per_token * tokens_per_param * shape.num_params,
            model,
            batch_size,
            f"{tokens_per_param:g} tokens a parameter",
        )
        for shape in chosen
    ]


def _run(
    shape: Shape, flops: float, model: Mapping[str, Any], batch_size: int, group: str
) -> dict[str, Any]:
    tokens_a_step = batch_size * model["seq_len"]
    steps = round(flops / shape.flops_per_token / tokens_a_step)
    if steps < 1:
        raise ValueError(
            f"budgets: {flops:g} FLOPs are less than a step of {tokens_a_step:,} tokens with "
            f"{shape.num_params:,} parameters"
        )
    return {**shape.overrides, "train.duration": steps, "group": group.replace("e+", "e")}
