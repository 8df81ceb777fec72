"""The best size for a budget: Chinchilla's first approach (envelope), second (isoFLOP curves)."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from gpt_jax.scaling.fits import fit_compute
from gpt_jax.scaling.laws import ComputeLaw, PowerLaw
from gpt_jax.scaling.points import Points, budgets

METHODS = ("parabola", "akima")


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The lowest loss of a budget: between runs where `reason` is empty, else why there is none.

    spread is the standard deviation of log num_params under noise of the loss; 0 where not asked.
    """

    flops: float
    num_params: float
    num_tokens: float
    loss: float
    spread: float = 0.0
    reason: str = ""


def fit_power(x: Any, y: Any, weights: Any = None) -> PowerLaw:
    """y = k x^p by (weighted) least squares of the logarithms.

    Raises:
      ValueError: Fewer than two different x.
    """
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(np.unique(x)) < 2:
        raise ValueError(f"ledger: {len(np.unique(x))} budgets with a minimum, a slope needs 2")
    weights = np.ones_like(x) if weights is None else np.asarray(weights, float)
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    slope = (weights * (x - x_mean) * (y - y_mean)).sum() / (weights * (x - x_mean) ** 2).sum()
    return PowerLaw(k=float(np.exp(y_mean - slope * x_mean)), p=float(slope))


def isoflop_minima(
    points: Points,
    method: str = "parabola",
    *,
    tolerance: float = 0.25,
    draws: int = 0,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Minimum]:
    """The minimum of each budget over log num_params; the best of runs with one size counts.

    Args:
      points: Runs; budgets are found by points.budgets.
      method: "parabola": least squares of the loss over log num_params through all runs of the
        budget (arXiv:2203.15556, section 3.2), biased where runs lie unevenly around the minimum.
        "akima": Akima's interpolation of log loss, 25 places between two runs, as in the code of
        arXiv:2406.19146. Its published exponents .835 .706 .602 .571 .497 come from minima under
        noise and `fit_minima(weighted=True)`: we get .8366 .7065 .6020 .5714 .4969 with its noise
        of .002; the first differs from the published .8353 by the draws of its noise alone, as far
        as we can tell. Without noise and weights it is .8348 .7003 .6055 .5715 .4970.
      tolerance: Of a budget's FLOPs.
      draws: With "akima": how often noise is added to the losses. The minimum is then the median
        over the draws, and `spread` their standard deviation, divided by the share of the draws
        that have an inner minimum and not below a third of the distance between two runs.
      noise: Standard deviation of a loss, nats; a function of the losses is allowed too.
      seed: Of the noise.

    Returns:
      One Minimum a budget, those with a reason too.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    rng = np.random.default_rng(seed)
    found = []
    for runs in budgets(points.flops, tolerance):
        best = points.take(_best_of_sizes(points, runs))
        flops = float(np.exp(np.log(points.flops[runs]).mean()))
        lowest = float(best.loss.min())
        if len(best) < 3:
            reason = f"{len(best)} sizes, a minimum needs 3"
            found.append(Minimum(flops, np.nan, np.nan, lowest, reason=reason))
            continue
        size, spread = np.log(best.num_params), 0.0
        if method == "parabola":
            place, lowest, reason = _parabola(size, best.loss)
        else:
            sd = noise(best.loss) if callable(noise) else noise
            noisy = best.loss + sd * rng.standard_normal((draws, len(best)))
            place, lowest, spread, reason = _akima(size, best.loss, noisy)
        per_token = np.exp(np.interp(place, size, np.log(best.flops / best.num_tokens)))
        found.append(
            Minimum(flops, float(np.exp(place)), flops / per_token, lowest, spread, reason)
        )
    return found


def fit_minima(minima: Sequence[Minimum], *, weighted: bool = False) -> tuple[PowerLaw, PowerLaw]:
    """(num_params, num_tokens) of the minima as power laws of the budget.

    Args:
      minima: Those with a reason are left out.
      weighted: By 1 / spread^2, as in the published exponents of arXiv:2406.19146.

    Raises:
      ValueError: Fewer than two minima; the text has the reasons of the others.
    """
    inner = [m for m in minima if not m.reason]
    if len(inner) < 2:
        why = "; ".join(f"{m.flops:.3g} FLOPs: {m.reason}" for m in minima if m.reason)
        raise ValueError(f"ledger: {len(inner)} budgets with a minimum, a law needs 2 ({why})")
    flops = [m.flops for m in inner]
    weights = [1 / m.spread**2 for m in inner] if weighted else None
    return (
        fit_power(flops, [m.num_params for m in inner], weights),
        fit_power(flops, [m.num_tokens for m in inner], weights),
    )


def frontier_places(points: Points, tolerance: float = 0.25) -> np.ndarray:
    """The place among the points of the run with the lowest loss of each budget."""
    return np.array([runs[points.loss[runs].argmin()] for runs in budgets(points.flops, tolerance)])


def frontier(points: Points, tolerance: float = 0.25) -> Points:
    """The run with the lowest loss of each budget."""
    return points.take(frontier_places(points, tolerance))


def fit_frontier(points: Points) -> ComputeLaw:
    """L(C) through the run with the lowest loss of each budget: GPT-4's form."""
    best = frontier(points)
    return fit_compute(best.flops, best.loss)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Validation losses of one run while it trains."""

    name: str
    num_params: float
    flops: np.ndarray
    loss: np.ndarray


def curves_of(rows: Iterable[Mapping[str, Any]], params: str = "num_params") -> list[Curve]:
    """Curves of a ledger's finished rows; FLOPs in proportion to tokens."""
    found = []
    for row in rows:
        curve = np.array(row.get("curve") or [], float).reshape(-1, 2)
        curve = curve[(curve[:, 0] > 0) & np.isfinite(curve[:, 1])]
        if row.get("status") == "finished" and len(curve):
            flops = curve[:, 0] * row["flops"] / row["num_tokens"]
            found.append(Curve(row["name"], float(row[params]), flops, curve[:, 1]))
    return found


def fit_envelope(curves: Sequence[Curve], num: int = 1500) -> tuple[PowerLaw, ComputeLaw]:
    """Chinchilla's first approach: best size and loss of a budget from training curves.

    At `num` budgets the run with the lowest loss (between its evaluations by interpolation over
    log FLOPs) gives the size. Budgets that fewer than two sizes reach do not count, nor those where
    the smallest or the largest size of all is best: there the best size lies outside. Curves of a
    decaying learning rate are above what a run of that length would reach, so this is a
    cross-check.

    Returns:
      num_params as a power law of the budget, and L(C) of the envelope.

    Raises:
      ValueError: Too few sizes have a place on the envelope.
    """
    sizes = np.array([curve.num_params for curve in curves])
    if len(np.unique(sizes)) < 4:
        raise ValueError(
            f"ledger: {len(np.unique(sizes))} sizes with a curve, an envelope needs 4 (the "
            "smallest and the largest are its ends)"
        )
    grid = np.geomspace(
        min(curve.flops.min() for curve in curves), max(curve.flops.max() for curve in curves), num
    )
    losses = np.array(
        [
            np.interp(np.log(grid), np.log(c.flops), c.loss, left=np.inf, right=np.inf)
            for c in curves
        ]
    )
    best = sizes[losses.argmin(0)]
    reach = np.array([len(np.unique(sizes[np.isfinite(at)])) for at in losses.T])
    kept = (reach >= 2) & (best > sizes.min()) & (best < sizes.max())
    if len(np.unique(best[kept])) < 2:
        raise ValueError("ledger: fewer than 2 inner sizes are ever the best of a budget")
    return fit_power(grid[kept], best[kept]), fit_compute(grid[kept], losses.min(0)[kept])


def _best_of_sizes(points: Points, runs: np.ndarray) -> np.ndarray:
    """Of each size the run with the lowest loss, from the smallest size on."""
    best: dict[float, int] = {}
    for run in runs:
        size = points.num_params[run]
        if size not in best or points.loss[run] < points.loss[best[size]]:
            best[size] = int(run)
    return np.array([best[size] for size in sorted(best)])


def _parabola(size: np.ndarray, loss: np.ndarray) -> tuple[float, float, str]:
    """Place and depth of the vertex, and why it does not count."""
    curvature, slope, constant = np.polyfit(size - size.mean(), loss, 2)
    if curvature <= 0:
        return np.nan, float(loss.min()), "the losses have no minimum over the sizes"
    place = -slope / (2 * curvature)
    depth = float(constant - slope**2 / (4 * curvature))
    place += size.mean()
    if not size[0] < place < size[-1]:
        return place, depth, "the minimum lies outside of the sizes"
    return float(place), depth, ""


def _akima(
    size: np.ndarray, loss: np.ndarray, noisy: np.ndarray
) -> tuple[float, float, float, str]:
    """Place, depth and spread of the interpolated minimum, and why it does not count."""
    grid = np.linspace(size[0], size[-1], 25 * (len(size) - 1))
    smooth = np.exp(Akima1DInterpolator(size, np.log(loss))(grid))
    at = int(smooth.argmin())
    edge = "the lowest loss is that of the {} size".format("smallest" if at == 0 else "largest")
    if at in (0, len(grid) - 1):
        return float(grid[at]), float(smooth[at]), 0.0, edge
    if not len(noisy):
        return float(grid[at]), float(smooth[at]), 0.0, ""
    curves = Akima1DInterpolator(size, np.log(noisy).T)(grid)  # [places, draws]
    places = curves.argmin(0)
    inner = (places > 0) & (places < len(grid) - 1)
    if inner.mean() < 0.5:
        return (
            float(grid[at]),
            float(smooth[at]),
            0.0,
            "with noise the minimum is mostly at an edge",
        )
    least = 0.33 * 25 * (grid[1] - grid[0])
    spread = max(float(grid[places[inner]].std()), least) / inner.mean()
    depth = float(np.exp(np.median(curves.min(0)[inner])))
    return float(np.median(grid[places[inner]])), depth, spread, ""
