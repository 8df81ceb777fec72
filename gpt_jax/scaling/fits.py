"""From points to laws: loss from compute, and loss from parameters and tokens.

All fits are deterministic. The best size for a budget (isoFLOP minima, envelopes) is in optima.py,
intervals are in bootstrap.py.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from gpt_jax.scaling import huber, projection
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
    require_compute(flops)
    return fit_compute_many(flops, loss, np.ones((1, len(flops))))[0]


def require_compute(flops: np.ndarray) -> None:
    """Raises a ValueError where the budgets are too few for L(C)."""
    if (budgets := len(np.unique(flops))) < 3:
        raise ValueError(
            f"ledger: too few budgets for {ComputeLaw.form}: missing {3 - budgets} more "
            f"({budgets} of at least 3)"
        )


def fit_compute_many(flops: np.ndarray, loss: np.ndarray, weights: np.ndarray) -> list[ComputeLaw]:
    """The laws for many weightings [weightings, points] of the points at once."""
    features = np.log(flops)[None, None]
    exponents, found = projection.fit_powers(features, loss, np.asarray(weights, float))
    return [
        ComputeLaw(a=float(a), b=-float(b), c=float(c))
        for (b,), (c, a) in zip(exponents, found, strict=True)
    ]


def fit_param_data(points: Points, method: str = "vpnls") -> ParamDataLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
      points: At least 6 runs with 3 sizes and 3 amounts of tokens.
      method: "vpnls": least squares of the loss, alpha and beta by search, E, A, B not below 0
        (variable projection). "huber": Chinchilla's third approach (arXiv:2203.15556, appendix
        D.3): the sum of Huber losses (1e-3) of the logarithms; ill-conditioned, so a cross-check.

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


_STARTS = {  # arXiv:2203.15556, appendix D.3
    "log A": np.arange(0.0, 26.0, 5.0),
    "log B": np.arange(0.0, 26.0, 5.0),
    "log E": np.arange(-1.0, 1.1, 0.5),
    "alpha": np.arange(0.0, 2.1, 0.5),
    "beta": np.arange(0.0, 2.1, 0.5),
}


def huber_objective(law: ParamDataLaw, points: Points) -> float:
    """Sum over points of Huber_1e-3(log L(N, D) - log loss): what "huber" makes least."""
    constants = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    design = _design(np.log(points.num_params), np.log(points.num_tokens))
    return huber.objective(constants, design, np.log(points.loss))[0]


def fit_huber(points: Points) -> ParamDataLaw:
    """Chinchilla's third approach: huber.search from the published grid of 4,500 starts."""
    size, tokens = np.log(points.num_params), np.log(points.num_tokens)
    starts = np.array(list(itertools.product(*_STARTS.values())))
    # Around the means of log N and log D, where the constants hang less together.
    starts[:, 0] -= starts[:, 3] * size.mean()
    starts[:, 1] -= starts[:, 4] * tokens.mean()
    design = _design(size - size.mean(), tokens - tokens.mean())
    (a, b, e, alpha, beta), _ = huber.search(design, np.log(points.loss), starts)
    return ParamDataLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * size.mean())),
        B=float(np.exp(b + beta * tokens.mean())),
        alpha=float(alpha),
        beta=float(beta),
    )


def _design(size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[terms, points, constants] for (log A, log B, log E, alpha, beta)."""
    one, zero = np.ones_like(size), np.zeros_like(size)
    return np.array(
        [
            np.stack([one, zero, zero, -size, zero], 1),
            np.stack([zero, one, zero, zero, -tokens], 1),
            np.stack([zero, zero, one, zero, zero], 1),
        ]
    )
