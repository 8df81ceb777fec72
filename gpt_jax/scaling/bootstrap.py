"""Intervals of predictions: runs drawn again with replacement, and the noise of a run on top."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special

from gpt_jax.scaling import fits, optima
from gpt_jax.scaling.laws import ComputeLaw
from gpt_jax.scaling.points import Points, budgets

_TRIES = 100  # draws without enough sizes for the law are drawn again


def _all_that_count(points: Points, places: np.ndarray) -> np.ndarray:
    fits.require_param_data(points.take(places))
    return places


def _best_that_count(points: Points, places: np.ndarray) -> np.ndarray:
    best = places[optima.frontier_places(points.take(places))]
    fits.require_compute(points.flops[best])
    return best


# Fits that have a form for many weightings of the points at once, 20 times faster: that form, and
# the places that count of those that were drawn.
_AT_ONCE = {
    fits.fit_param_data: (fits.fit_param_data_many, _all_that_count),
    optima.fit_frontier: (
        lambda points, weights: fits.fit_compute_many(points.flops, points.loss, weights),
        _best_that_count,
    ),
}


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """A law, the laws of points drawn again, and how far single runs lie from the law.

    noise is the standard deviation of log(loss / prediction) with `freedom` degrees of freedom: the
    number of points less that of the law's constants.
    """

    law: Any
    laws: tuple[Any, ...]
    noise: float
    freedom: int
    seed: int

    def numbers(self, number: Callable[[Any], Any]) -> np.ndarray:
        """A number of every drawn law, [draws, ...], moved away from that of the first law.

        By sqrt(n / (n - constants)), as a law lies closer to its own points than to the truth.
        """
        constants = fits.num_constants(self.law)
        wider = np.sqrt((self.freedom + constants) / self.freedom)
        middle = np.asarray(number(self.law), float)
        return middle + wider * (np.array([number(law) for law in self.laws], float) - middle)

    def spread(self, number: Callable[[Any], Any], level: float = 0.9) -> tuple[Any, Any]:
        """Interval of a number of the law itself, such as an exponent or the mean loss of a run."""
        numbers = self.numbers(number)
        low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def bootstrap(
    points: Points,
    fit: Callable[[Points], Any],
    draws: int = 400,
    seed: int = 0,
    *,
    within_budgets: bool = False,
) -> Bootstrap:
    """Fits points drawn with replacement, as many as there are.

    Args:
      points: The runs.
      fit: From Points to a law, such as fits.fit_param_data or optima.fit_frontier.
      draws: Number of laws.
      seed: Of the draws: the same seed, the same laws.
      within_budgets: Draw inside each budget (points.budgets), so that each keeps its number of
      runs.

    Raises:
      ValueError: The points do not suffice for the fit, or hardly any draw of them does.
    """
    law = fit(points)
    rng = np.random.default_rng(seed)
    groups = budgets(points.flops) if within_budgets else [np.arange(len(points))]

    def draw(accepted: Callable[[np.ndarray], Any]) -> Any:
        for _ in range(_TRIES):
            places = np.concatenate([rng.choice(group, len(group)) for group in groups])
            try:
                return accepted(places)
            except ValueError:
                continue
        raise ValueError(f"ledger: {len(points)} runs, and hardly any draw of them can be fitted")

    if fit in _AT_ONCE:
        fit_many, count = _AT_ONCE[fit]
        counted = [draw(lambda places: count(points, places)) for _ in range(draws)]
        laws = fit_many(points, np.array([np.bincount(c, minlength=len(points)) for c in counted]))
    else:
        laws = [draw(lambda places: fit(points.take(places))) for _ in range(draws)]
    return Bootstrap(law, tuple(laws), *run_noise(points, law), seed)


def run_noise(points: Points, law: Any) -> tuple[float, int]:
    """(noise, freedom) of a law and its points, as in Bootstrap.

    For L(C) the points are the best runs of the budgets: the others are not what it tells of.
    """
    if isinstance(law, ComputeLaw):
        points = optima.frontier(points)
    residuals = np.log(points.loss / fits.predicted(law, points))
    freedom = max(len(points) - fits.num_constants(law), 1)
    return float(np.sqrt((residuals**2).sum() / freedom)), freedom


def interval(
    found: Bootstrap, predict: Callable[[Any], Any], level: float = 0.9
) -> tuple[Any, Any]:
    """Interval for the loss of a new run: the laws' spread and the noise of a run.

    Every drawn law's prediction is spread by Student's t with the noise's degrees of freedom, on
    the logarithm of the loss.

    Args:
      found: Of `bootstrap`.
      predict: From a law to the loss, such as `lambda law: law.predict(num_params, num_tokens)`; an
        array gives arrays.
      level: Share of new runs that it should contain.
    """
    losses = found.numbers(predict)
    shares = (np.arange(199) + 0.5) / 199
    noise = np.exp(found.noise * special.stdtrit(found.freedom, shares))
    spread = losses[:, None] * noise.reshape(-1, *[1] * (losses.ndim - 1))
    spread = spread.reshape(-1, *losses.shape[1:])
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
