"""From points to laws: loss from compute, and loss from parameters and tokens.

All fits are deterministic. The best size for a budget (isoFLOP minima, envelopes) is in optima.py,
intervals are in bootstrap.py.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
from scipy import optimize

from gpt_jax.scaling import projection
from gpt_jax.scaling.laws import ComputeLaw, OvertrainingLaw, ParamDataLaw, RepeatedDataLaw
from gpt_jax.scaling.points import Points, require

METHODS = ("vpnls", "huber")
_PREDICTED = {
    ComputeLaw: lambda law, p: law.predict(p.flops),
    ParamDataLaw: lambda law, p: law.predict(p.num_params, p.num_tokens),
    RepeatedDataLaw: lambda law, p: law.predict(p.num_params, p.num_tokens, p.unique_tokens),
    OvertrainingLaw: lambda law, p: law.predict(
        6 * p.num_params * p.num_tokens, p.num_tokens / p.num_params
    ),
}


def predicted(law: Any, points: Points) -> np.ndarray:
    """[points] losses that a law of this file predicts for the points."""
    return _PREDICTED[type(law)](law, points)


def num_constants(law: Any) -> int:
    """Number of fitted constants of a law."""
    values = [getattr(law, field.name) for field in dataclasses.fields(law)]
    return sum(num_constants(value) if dataclasses.is_dataclass(value) else 1 for value in values)


def fit_compute(flops: Any, loss: Any) -> ComputeLaw:
    """L(C) = a C^b + c by least squares of the loss: b by search, a and c not below 0.

    Args:
      flops: [points] budgets.
      loss: [points], of the best run of each budget.

    Raises:
      ValueError: Fewer than three budgets: the law has three constants.
    """
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    if len(np.unique(flops)) < 3:
        raise ValueError(
            f"ledger: too few budgets for {ComputeLaw.form}: missing "
            f"{3 - len(np.unique(flops))} more ({len(np.unique(flops))} of at least 3)"
        )
    features = np.log(flops)[None, None]
    exponents, found = projection.fit_powers(features, loss, np.ones((1, len(flops))))
    return ComputeLaw(a=float(found[0, 1]), b=-float(exponents[0, 0]), c=float(found[0, 0]))


def fit_param_data(points: Points, method: str = "vpnls") -> ParamDataLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
      points: At least 6 runs with 3 sizes and 3 amounts of tokens.
      method: "vpnls": least squares of the loss, alpha and beta by search, E, A, B not below 0
        (variable projection). "huber": Chinchilla's third approach (arXiv:2203.15556, appendix D.3):
        the sum of Huber losses (1e-3) of the logarithms; ill-conditioned, so a cross-check.

    Raises:
      ValueError: An unknown method, or too few points.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    require_param_data(points)
    if method == "huber":
        return fit_huber(points)
    return fit_param_data_many(points, np.ones((1, len(points))))[0]


def require_param_data(points: Points) -> None:
    """Raises a ValueError where the points are too few for L(N, D)."""
    require(points, ParamDataLaw.form, runs=6, sizes=3, amounts=3)


def fit_param_data_many(points: Points, weights: np.ndarray) -> list[ParamDataLaw]:
    """The laws of "vpnls" for many weightings [weightings, points] of the points at once."""
    zeros = np.zeros(len(points))
    features = np.array([[np.log(points.num_params), zeros], [zeros, np.log(points.num_tokens)]])
    exponents, found = projection.fit_powers(features, points.loss, np.asarray(weights, float))
    return [
        ParamDataLaw(*map(float, (E, A, B, alpha, beta)))
        for (alpha, beta), (E, A, B) in zip(exponents, found, strict=True)
    ]


def fit_overtraining(points: Points) -> OvertrainingLaw:
    """L(C, M) by least squares of the loss (arXiv:2403.08540), with C = 6 N D and M = D / N.

    Then C^-eta M^eta = 6^-eta N^(-2 eta) and C^-eta M^-eta = 6^-eta D^(-2 eta): L(N, D) with one
    exponent for both.
    """
    require(points, OvertrainingLaw.form, runs=5, sizes=2, amounts=2)
    flops = np.log(6 * points.num_params * points.num_tokens)
    multiplier = np.log(points.num_tokens / points.num_params)
    features = np.array([[flops - multiplier], [flops + multiplier]])
    exponents, found = projection.fit_powers(features, points.loss, np.ones((1, len(points))))
    E, a, b = map(float, found[0])
    return OvertrainingLaw(E=E, a=a, b=b, eta=float(exponents[0, 0]))


_DELTA = 1e-3
_STARTS = {  # arXiv:2203.15556, appendix D.3
    "a": np.arange(0.0, 26.0, 5.0),
    "b": np.arange(0.0, 26.0, 5.0),
    "e": np.arange(-1.0, 1.1, 0.5),
    "alpha": np.arange(0.0, 2.1, 0.5),
    "beta": np.arange(0.0, 2.1, 0.5),
}


def huber_objective(law: ParamDataLaw, points: Points) -> float:
    """Sum over points of Huber_1e-3(log L(N, D) - log loss): what "huber" makes least."""
    constants = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    value, _ = _huber(constants, np.log(points.num_params), np.log(points.num_tokens), points)
    return float(value)


def fit_huber(points: Points, num_starts: int = 8) -> ParamDataLaw:
    """Chinchilla's third approach: L-BFGS over log A, log B, log E, alpha, beta.

    The objective is computed at every point of the published grid of starts; from the best
    `num_starts` of them the search is run to the end, with an analytic gradient and with log N and
    log D around their means, where the problem is better conditioned. The sum, not the mean: with the
    mean, tolerances stop the search early (arXiv:2404.10102).
    """
    size, tokens = np.log(points.num_params), np.log(points.num_tokens)
    middle = size.mean(), tokens.mean()
    size, tokens = size - middle[0], tokens - middle[1]
    starts = np.array(list(itertools.product(*_STARTS.values())))
    starts[:, 0] -= starts[:, 3] * middle[0]
    starts[:, 1] -= starts[:, 4] * middle[1]
    values = np.array([_huber(start, size, tokens, points)[0] for start in starts])
    best, least = starts[0], np.inf
    for start in starts[np.argsort(values, kind="stable")[:num_starts]]:
        found = optimize.minimize(
            _huber,
            start,
            args=(size, tokens, points),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 30},
        )
        if found.fun < least:
            best, least = found.x, found.fun
    a, b, e, alpha, beta = map(float, best)
    return ParamDataLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * middle[0])),
        B=float(np.exp(b + beta * middle[1])),
        alpha=alpha,
        beta=beta,
    )


def _huber(
    constants: np.ndarray, size: np.ndarray, tokens: np.ndarray, points: Points
) -> tuple[float, np.ndarray]:
    """The objective and its gradient for (log A, log B, log E, alpha, beta)."""
    a, b, e, alpha, beta = constants
    terms = np.stack([a - alpha * size, b - beta * tokens, np.full_like(size, e)])
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residual = top + np.log(total) - np.log(points.loss)
    shares = shares / total
    near = np.abs(residual) <= _DELTA
    losses = np.where(near, residual**2 / 2, _DELTA * (np.abs(residual) - _DELTA / 2))
    slope = np.clip(residual, -_DELTA, _DELTA)
    of_size, of_tokens, of_constant = shares @ slope
    gradient = [
        of_size,
        of_tokens,
        of_constant,
        -(shares[0] * slope * size).sum(),
        -(shares[1] * slope * tokens).sum(),
    ]
    return losses.sum(), np.array(gradient)
