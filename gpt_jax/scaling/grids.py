"""Runs of a sweep as dicts {dotted field: value}, and how lists of them combine.  Starts no JAX.

  product(values("model.embed_dim", [32, 64]), values("seed", [0, 1, 2]))     # six runs
  zipped(values("model.embed_dim", [32, 64]), values("train.duration", ["300 steps", "600 steps"]))

Each function takes and returns any iterables of such dicts, so they nest, and a generator of dicts
is a grid too. What an override may hold beside fields is told in launch/sweeps.py.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

Overrides = dict[str, Any]
Grid = Iterable[Mapping[str, Any]]


def values(key: str, xs: Iterable[Any]) -> list[Overrides]:
    """One run for each value of a field."""
    return [{key: x} for x in xs]


def product(*grids: Grid) -> list[Overrides]:
    """Every run of the first with every run of the second and so on; the last varies fastest.

    Raises:
      ValueError: Two grids set one field.
    """
    return [_joined(parts, "product") for parts in itertools.product(*map(list, grids))]


def zipped(*grids: Grid) -> list[Overrides]:
    """The first run of each, the second of each, and so on.

    Raises:
      ValueError: Grids of different lengths, or two of them set one field.
    """
    grids = [list(grid) for grid in grids]
    if len({len(grid) for grid in grids}) > 1:
        lengths = " and ".join(str(len(grid)) for grid in grids)
        raise ValueError(f"zipped: grids of {lengths} runs do not go in step")
    return [_joined(parts, "zipped") for parts in zip(*grids, strict=True)]


def chain(*grids: Grid) -> list[Overrides]:
    """The runs of the first, then those of the second, and so on."""
    return [dict(run) for run in itertools.chain(*grids)]


def _joined(parts: Iterable[Mapping[str, Any]], what: str) -> Overrides:
    run: Overrides = {}
    for part in parts:
        for key, value in part.items():
            if key in run:
                raise ValueError(f"{key}: given by two grids of a {what}")
            run[key] = value
    return run
