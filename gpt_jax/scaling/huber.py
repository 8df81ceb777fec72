"""Huber loss of logarithms of sums, made least by BFGS: Chinchilla's third approach and its
kin."""

import numpy as np
from scipy import optimize

DELTA = 1e-3


def objective(
    constants: np.ndarray, design: np.ndarray, log_loss: np.ndarray
) -> tuple[float, np.ndarray]:
    """Sum over points of Huber_1e-3(log sum_j exp(design_j constants) - log loss), and its
    gradient.

    Args:
      constants: [constants].
      design: [terms, points, constants].
      log_loss: [points].
    """
    terms = design @ constants
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residual = top + np.log(total) - log_loss
    slope = np.clip(residual, -DELTA, DELTA)
    gradient = np.einsum("jn,jnc->c", shares / total * slope, design)
    return float(_huber(residual).sum()), gradient


def search(
    design: np.ndarray, log_loss: np.ndarray, starts: np.ndarray, num_searches: int = 8
) -> tuple[np.ndarray, float]:
    """The constants that make the objective least, and its value.

    The objective is computed at all starts; from the best `num_searches` of them BFGS runs to its
    end, on the sum in units of 1e-6: with the mean, tolerances stop the search early
    (arXiv:2404.10102). Full BFGS, as five constants need no limited memory, and scipy's L-BFGS-B is
    10 times slower where threads are scarce.

    Args:
      design: [terms, points, constants]; columns around 0 make the problem better conditioned.
      log_loss: [points].
      starts: [starts, constants].
    """
    terms = np.einsum("jnc,sc->jsn", design, starts)
    residual = np.logaddexp.reduce(terms, axis=0) - log_loss
    order = np.argsort(_huber(residual).sum(1), kind="stable")[:num_searches]

    def scaled(constants: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(constants, design, log_loss)
        return value / DELTA**2, gradient / DELTA**2

    options = {"gtol": 1e-9, "maxiter": 3000}
    found = [
        optimize.minimize(scaled, start, jac=True, method="BFGS", options=options)
        for start in starts[order]
    ]
    best = min(found, key=lambda end: end.fun)
    return best.x, float(best.fun) * DELTA**2


def _huber(residual: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2))
