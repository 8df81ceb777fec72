"""The laws that are fitted by name, each with the runs drawn again for its intervals."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpt_jax.scaling.bootstrap import Bootstrap, bootstrap, interval
from gpt_jax.scaling.fits import fit_param_data
from gpt_jax.scaling.optima import fit_frontier, fit_power, frontier
from gpt_jax.scaling.points import Points, Row, budgets, points_of

LEVEL = 0.9


@dataclasses.dataclass(frozen=True)
class Law:
    """How a law is fitted and asked.

    Attributes:
      fit: From Points to the law.
      predict: (law, num_params, num_tokens, flops) -> loss.
      within_budgets: Whether runs are drawn again budget by budget.
      draws: So often.
    """

    fit: Callable[[Points], Any]
    predict: Callable[[Any, float, float, float], Any]
    within_budgets: bool
    draws: int


def _of_both(law: Any, num_params: float, num_tokens: float, flops: float) -> Any:
    return law.predict(num_params, num_tokens)


def _of_compute(law: Any, num_params: float, num_tokens: float, flops: float) -> Any:
    return law.predict(flops)


_fit_huber = functools.partial(fit_param_data, method="huber")
# THE table: name on the command line and in prediction files -> law. The first is believed most.
LAWS = {
    "param_data": Law(fit_param_data, _of_both, within_budgets=False, draws=400),
    "compute": Law(fit_frontier, _of_compute, within_budgets=True, draws=400),
    "param_data_huber": Law(_fit_huber, _of_both, within_budgets=False, draws=40),
}
BOTH_FORMS = ("param_data", "compute")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law of the table and its points."""

    name: str
    found: Bootstrap
    points: Points

    def loss(
        self, num_params: float, num_tokens: float, flops: float
    ) -> tuple[float, float, float]:
        """(loss, low, high) of a new run; the interval is of LEVEL.

        Raises:
          ValueError: The points are too few for an interval.
        """

        def predict(law: Any) -> Any:
            return LAWS[self.name].predict(law, num_params, num_tokens, flops)

        return finite_interval(self.found, predict)


def finite_interval(found: Bootstrap, predict: Callable[[Any], Any]) -> tuple[float, float, float]:
    """(prediction, low, high), all finite, or a ValueError."""
    values = (float(predict(found.law)), *map(float, interval(found, predict, LEVEL)))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"ledger: the {LEVEL:.0%} interval is not finite: the runs are too few")
    return values


def check_law(name: str) -> str:
    """The name, if the table has it."""
    if name not in LAWS:
        raise ValueError(f"law: {name!r} is not one of {', '.join(LAWS)}")
    return name


def fit_law(name: str, points: Points, seed: int = 0) -> Fitted:
    """Fits a law of the table, and to points drawn again.

    Raises:
      ValueError: An unknown law, or too few points; the text says what is missing.
    """
    law = LAWS[check_law(name)]
    found = bootstrap(points, law.fit, law.draws, seed, within_budgets=law.within_budgets)
    return Fitted(name, found, points)


def ladder_points(
    rows: Iterable[Row],
    params: str = "num_params",
    without: Mapping[str, str] | None = None,
    min_tokens: int = 0,
) -> Points:
    """The points of a ledger that laws are fitted to.

    Left out, and named in `excluded`, is what points_of leaves out, and runs that were predicted:
    a law that has seen them says nothing about them.

    Args:
      rows: Of a ledger.
      params: As of points_of.
      without: {name: reason} of runs that are left out too.
      min_tokens: Runs that saw fewer are left out: of them the warm-up tells, not
        the law.

    Raises:
      ValueError: No run is left, or those that are left were trained on different data.
    """
    rows = list(rows)
    out = {row["name"]: "was predicted" for row in rows if row.get("prediction_sha256")}
    out |= without or {}
    points = points_of([row for row in rows if row["name"] not in out], params=params)
    kept = set(points.names)
    data = sorted({str(row.get("data")) for row in rows if row["name"] in kept})
    if len(data) > 1:
        raise ValueError(f"ledger: its runs are of different data: {'; '.join(data)}")
    points = dataclasses.replace(points, excluded=(*points.excluded, *out.items()))
    return points.where(points.num_tokens >= min_tokens, f"saw fewer than {min_tokens:,} tokens")


def fit_measure(
    points: Points, values: Mapping[str, float], draws: int = 400, seed: int = 0
) -> Bootstrap:
    """y = k C^p through the best runs of the budgets, with y = -log of a share (GPT-4's form).

    arXiv:2303.08774, section 3.2: -E[log pass_rate(C)] = alpha C^-k.

    Args:
      points: The runs; the lowest loss of a budget says which is its best.
      values: y of each of them by name, above 0.
      draws, seed: As of bootstrap, within budgets.

    Raises:
      ValueError: Fewer than three budgets.
    """
    groups = budgets(points.flops)
    if len(groups) < 3:
        raise ValueError(
            f"ledger: too few budgets for y = k C^p: missing {3 - len(groups)} more "
            f"({len(groups)} of at least 3)"
        )

    def fit(chosen: Points) -> Any:
        best = frontier(chosen)
        return fit_power(best.flops, [values[name] for name in best.names])

    law, best, rng = fit(points), frontier(points), np.random.default_rng(seed)
    laws = tuple(
        fit(points.take(np.concatenate([rng.choice(group, len(group)) for group in groups])))
        for _ in range(draws)
    )
    residuals = np.log([values[name] for name in best.names] / law.predict(best.flops))
    freedom = len(best) - 2
    return Bootstrap(law, laws, float(np.sqrt((residuals**2).sum() / freedom)), freedom, seed)
