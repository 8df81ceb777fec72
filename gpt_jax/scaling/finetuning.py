"""Laws of the loss of finetuned models: Hernandez' unified form and Zhang's joint law."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from scipy import optimize

from gpt_jax.scaling import huber
from gpt_jax.scaling.laws import JointLaw, TransferLaw, UnifiedTransferLaw
from gpt_jax.scaling.points import Points, require


def fit_unified(scratch: Points, finetuned: Points) -> UnifiedTransferLaw:
    """Kaplan's L(N, D) on the runs from scratch, then D_T(D_F, N) in its place of D on the others.

    Both by least squares of log loss from several starts. Only k / D_c can be told from finetuned
    runs, so D_c comes from those from scratch.

    Raises:
      ValueError: Too few runs.
    """
    require(scratch, UnifiedTransferLaw.form, runs=5, sizes=2, amounts=3)
    require(finetuned, UnifiedTransferLaw.form, runs=4, sizes=2, amounts=2)
    size, data = np.log(scratch.num_params), np.log(scratch.unique_tokens)
    loss = np.log(scratch.loss)

    def kaplan(c: np.ndarray, log_size: np.ndarray, log_data: np.ndarray) -> np.ndarray:
        # c: alpha_n, alpha_d, and the scales N_c, D_c at the middle of the runs' logarithms.
        ratio = c[0] / c[1]
        return c[1] * np.logaddexp(
            ratio * (c[2] + size.mean() - log_size), c[3] + data.mean() - log_data
        )

    starts = itertools.product([0.05, 0.2], [0.1, 0.4], [-3.0, 3.0], [-3.0, 3.0])
    low = [1e-3, 1e-3, -60.0, -60.0]
    alone = _least(lambda c: kaplan(c, size, data) - loss, starts, low, [3.0, 3.0, 90.0, 90.0])
    tuned_size, tuned_data = np.log(finetuned.num_params), np.log(finetuned.unique_tokens)
    tuned_loss = np.log(finetuned.loss)
    middle = tuned_size.mean(), tuned_data.mean()

    def residual(c: np.ndarray) -> np.ndarray:
        log_transferred = c[0] + c[1] * (tuned_data - middle[1]) + c[2] * (tuned_size - middle[0])
        return kaplan(alone, tuned_size, log_transferred) - tuned_loss

    starts = itertools.product(middle[1] + np.array([0.0, 3.0, 8.0]), [0.1, 0.5], [0.1, 0.5])
    log_k, alpha, beta = _least(residual, starts, [-20.0, -2.0, -2.0], [80.0, 3.0, 3.0])
    transfer = TransferLaw(
        k=float(np.exp(log_k - alpha * middle[1] - beta * middle[0])),
        alpha=float(alpha),
        beta=float(beta),
    )
    scales = np.exp(alone[2] + size.mean()), np.exp(alone[3] + data.mean())
    return UnifiedTransferLaw(transfer, *map(float, (*scales, alone[0], alone[1])))


def _least(residual: Callable, starts: Iterable, low: list[float], high: list[float]) -> np.ndarray:
    """The best end of bounded least-squares searches."""
    found = [
        optimize.least_squares(residual, start, bounds=(low, high), xtol=1e-14, ftol=1e-14)
        for start in starts
    ]
    return min(found, key=lambda end: end.cost).x


def fit_joint(x: np.ndarray, finetune_tokens: np.ndarray, loss: np.ndarray) -> JointLaw:
    """L(X, D_F) = A / (X^alpha D_F^beta) + E by the Huber loss of logarithms (arXiv:2402.17193).

    Args:
      x: [runs] num_params, pretraining tokens, or the number of trained parameters.
      finetune_tokens: [runs].
      loss: [runs].

    Raises:
      ValueError: Fewer than 5 runs, or fewer than 2 values of x or of finetuning data.
    """
    x, tokens = np.log(np.asarray(x, float)), np.log(np.asarray(finetune_tokens, float))
    loss = np.asarray(loss, float)
    if len(loss) < 5 or len(np.unique(x)) < 2 or len(np.unique(tokens)) < 2:
        raise ValueError(
            f"ledger: too few runs for {JointLaw.form}: {len(loss)} runs with {len(np.unique(x))} "
            f"X and {len(np.unique(tokens))} amounts of data; at least 5 with 2 and 2 are needed"
        )
    middle = x.mean(), tokens.mean()
    one, zero = np.ones_like(x), np.zeros_like(x)
    design = np.array(
        [
            np.stack([one, zero, -(x - middle[0]), -(tokens - middle[1])], 1),
            np.stack([zero, one, zero, zero], 1),
        ]
    )
    level = np.log(loss.mean())
    exponents = [0.0, 0.1, 0.3, 1.0]
    offsets = [-4.0, -2.0, -1.0, 0.0]
    starts = [
        (level + a, level + e, alpha, beta)
        for a, e, alpha, beta in itertools.product(offsets, offsets, exponents, exponents)
    ]
    (a, e, alpha, beta), _ = huber.search(design, np.log(loss), np.array(starts))
    return JointLaw(
        A=float(np.exp(a + alpha * middle[0] + beta * middle[1])),
        alpha=float(alpha),
        beta=float(beta),
        E=float(np.exp(e)),
    )


def leave_one_size_out(
    num_params: np.ndarray,
    actual: np.ndarray,
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[float, float]:
    """Mean relative error on each size by a law that was fitted without it.

    Args:
      num_params: [runs].
      actual: [runs], what is predicted: a loss, or D_T.
      predict: (rows to fit, rows to predict) -> predictions of the latter.

    Returns:
      {size: mean of |prediction / actual - 1|}; nan where the others cannot be fitted.
    """
    errors = {}
    for size in np.unique(num_params):
        of_size = num_params == size
        try:
            guessed = predict(np.flatnonzero(~of_size), np.flatnonzero(of_size))
            errors[float(size)] = float(np.abs(guessed / actual[of_size] - 1).mean())
        except ValueError:
            errors[float(size)] = float("nan")
    return errors
