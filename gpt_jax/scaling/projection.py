"""Least squares of sums of powers: exponents by search, coefficients by linear algebra.

  y = c_0 + sum_j c_j exp(-sum_k e_k F_jk),   c >= 0

For given exponents e the coefficients are a linear least-squares problem with three unknowns or
fewer, so that only the exponents are searched (variable projection). That is far better
conditioned than a search of all constants at once. Many weightings of the same points, as a
bootstrap draws them, are solved together: everything is an array with a leading axis of weightings.
"""

import itertools

import numpy as np

_GRID = 21  # points an exponent in the first grid
_ZOOM = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])  # later grids, in units of the step
_LEVELS, _SHRINK = 46, 0.62  # the last step is 1e-9 of the first


def fit_powers(
    features: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    bounds: tuple[float, float] = (0.02, 2.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of y for every weighting.

    Args:
      features: F [terms, exponents, points], usually logarithms.
      y: [points].
      weights: [weightings, points], at least 0; a run drawn twice has 2.
      bounds: Of each exponent.

    Returns:
      Exponents [weightings, exponents] and coefficients [weightings, 1 + terms], the constant
      first.
    """
    # Around their mean, so that columns are near 1 whatever the units; undone at the end.
    middle = features.mean(-1, keepdims=True)
    features = features - middle
    num_exponents = features.shape[1]
    axis = np.geomspace(*bounds, _GRID)
    grid = np.array(list(itertools.product(axis, repeat=num_exponents)))
    exponents = np.broadcast_to(grid, (len(weights), *grid.shape))
    coefficients, best = _best(features, y, weights, exponents)
    place = np.take_along_axis(exponents, best[:, None, None], 1)[:, 0]
    offsets = np.array(list(itertools.product(_ZOOM, repeat=num_exponents)))
    step = np.log(axis[1] / axis[0])  # in the logarithm of the exponent
    for _ in range(_LEVELS):
        exponents = np.clip(place[:, None] * np.exp(step * offsets), *bounds)
        coefficients, best = _best(features, y, weights, exponents)
        place = np.take_along_axis(exponents, best[:, None, None], 1)[:, 0]
        step *= _SHRINK
    shift = np.exp(np.einsum("wk,jk->wj", place, middle[..., 0]))
    coefficients = np.concatenate([coefficients[:, :1], coefficients[:, 1:] * shift], 1)
    return place, coefficients


def _best(
    features: np.ndarray, y: np.ndarray, weights: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of candidates [weightings, candidates, exponents] each weighting's best, and its number."""
    columns = np.exp(-np.einsum("wgk,jkn->wgjn", exponents, features))
    ones = np.ones_like(columns[:, :, :1])
    columns = np.concatenate([ones, columns], 2)  # [weightings, candidates, 1 + terms, points]
    coefficients = _nonnegative(columns, y, weights)
    residual = y - np.einsum("wgj,wgjn->wgn", coefficients, columns)
    squares = np.einsum("wn,wgn->wg", weights, residual**2)
    best = squares.argmin(1)
    return np.take_along_axis(coefficients, best[:, None, None], 1)[:, 0], best


def _nonnegative(columns: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of least squares that are at least 0: the best of all sets of columns."""
    weighted = columns * weights[:, None, None, :]
    gram = weighted @ np.swapaxes(columns, 2, 3)
    target = weighted @ y
    coefficients = _solve(gram, target)
    wrong = ~((coefficients >= 0) & np.isfinite(coefficients)).all(-1)
    if not wrong.any():
        return coefficients
    gram, target = gram[wrong], target[wrong]
    squares = np.full(len(gram), np.inf)
    found = np.zeros_like(target)
    for kept in itertools.product([False, True], repeat=gram.shape[-1]):
        chosen = np.flatnonzero(kept)
        tried = np.zeros_like(target)
        tried[:, chosen] = _solve(gram[:, chosen[:, None], chosen], target[:, chosen])
        # Squares without those of y, which are the same for all.
        value = np.einsum("ij,ijk,ik->i", tried, gram, tried) - 2 * (tried * target).sum(-1)
        better = (tried >= 0).all(-1) & (value < squares)
        found[better], squares[better] = tried[better], value[better]
    coefficients[wrong] = found
    return coefficients


def _solve(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solutions [..., n] of normal equations [..., n, n]; not finite where there is none.

    All are eliminated together, a column after the other: of so few columns LAPACK, called for
    each, is slower.
    """
    places = range(gram.shape[-1])
    rows = [[gram[..., i, j] for j in places] for i in places]
    right = [target[..., i] for i in places]
    # A hint of a ridge: columns that coincide would have no solution, and lose by their squares.
    ridge = 1e-15 * np.trace(gram, axis1=-2, axis2=-1)
    for i in places:
        rows[i][i] = rows[i][i] + ridge
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for i, j in itertools.combinations(places, 2):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [low - factor * high for high, low in zip(rows[i], rows[j], strict=True)]
            right[j] = right[j] - factor * right[i]
        for i in reversed(places):
            known = sum(rows[i][j] * right[j] for j in places[i + 1 :])
            right[i] = (right[i] - known) / rows[i][i]
    return np.stack(right, -1) if places else target
