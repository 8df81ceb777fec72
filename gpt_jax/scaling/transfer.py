"""What pretraining is worth, in data: from runs from scratch and finetuned runs to transfer laws.

D_F is the finetuning data; D_E the data that a model of the same size needs for the same loss from
scratch; D_T = D_E - D_F what pretraining gave. The unit is the points': tokens, which are bytes
with a byte vocabulary. arXiv:2102.01293 counts characters and non-embedding parameters.
"""

import dataclasses

import numpy as np

from gpt_jax.scaling.laws import TransferLaw
from gpt_jax.scaling.points import Points

LOW_DATA = 0.10  # arXiv:2102.01293: the law holds where D_F / D_E is at most this


@dataclasses.dataclass(frozen=True)
class Effective:
    """Effective data of one cell: a size and an amount of finetuning data, the mean of its seeds.

    `reason` tells why a cell is no point of the fit; empty where it is one.
    """

    num_params: float
    finetune_tokens: float  # D_F
    loss: float
    effective_tokens: float  # D_E; nan where the runs from scratch do not reach the loss
    reason: str = ""

    @property
    def transferred(self) -> float:
        """D_T; below 0 where pretraining hurt."""
        return self.effective_tokens - self.finetune_tokens

    @property
    def fraction(self) -> float:
        """D_T / D_E: the share of the effective data that pretraining gave."""
        return self.transferred / self.effective_tokens

    @property
    def multiplier(self) -> float:
        """D_E / D_F: by how much pretraining multiplies the data."""
        return self.effective_tokens / self.finetune_tokens


def effective_tokens(tokens: np.ndarray, loss: np.ndarray, reached: float) -> float:
    """The amount of data with which a curve of runs from scratch reaches a loss.

    Interpolates log data over log loss. The curve is first made to fall: a run that is worse than
    one with less data counts as that one. Nothing is extrapolated.

    Args:
      tokens, loss: [runs] of one size.
      reached: The loss.

    Returns:
      nan where the loss lies outside of the curve.
    """
    order = np.argsort(tokens, kind="stable")
    tokens, loss = np.log(tokens[order]), np.log(np.minimum.accumulate(loss[order]))
    kept = np.concatenate([[True], np.diff(loss) < 0])  # where it falls: the least data for a loss
    tokens, loss = tokens[kept], loss[kept]
    return float(np.exp(np.interp(-np.log(reached), -loss, tokens, left=np.nan, right=np.nan)))


def effective_data(
    scratch: Points, finetuned: Points, low_data: float = LOW_DATA
) -> list[Effective]:
    """Effective data of every cell (size, amount of data) of the finetuned runs.

    Seeds of a cell are averaged first. `unique_tokens` is what counts as data.

    Args:
      scratch: Runs from scratch on the target data: several amounts of data a size.
      finetuned: Runs from the pretrained model, of the same sizes.
      low_data: Largest D_F / D_E of a point of the fit.

    Returns:
      One entry a cell, by size and data; those that cannot be used with their reason.

    Raises:
      ValueError: No size has runs of both kinds.
    """
    curves = cells(scratch)
    if not set(curves) & set(cells(finetuned)):
        raise ValueError("ledger: no size has both runs from scratch and finetuned runs")
    found = []
    for size, (tokens, losses) in cells(finetuned).items():
        for amount, loss in zip(tokens, losses, strict=True):
            if size not in curves:
                reason = "no run of this size from scratch"
                found.append(Effective(size, float(amount), float(loss), np.nan, reason))
                continue
            data = effective_tokens(*curves[size], loss)
            reason = _reason(curves[size][1], loss, amount, data, low_data)
            found.append(Effective(size, float(amount), float(loss), data, reason))
    return found


def cells(points: Points) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """{num_params: (amounts of data, mean loss of their seeds)}, both from the smallest on."""
    found = {}
    for size in np.unique(points.num_params):
        of_size = points.num_params == size
        amounts = np.unique(points.unique_tokens[of_size])
        means = [points.loss[of_size & (points.unique_tokens == a)].mean() for a in amounts]
        found[float(size)] = (amounts, np.array(means))
    return found


def _reason(curve: np.ndarray, loss: float, amount: float, data: float, low_data: float) -> str:
    if loss < curve.min():
        return "better than every run from scratch: D_E lies beyond them"
    if loss > curve[0]:
        return "worse than the smallest run from scratch"
    if data <= amount:
        return "pretraining did not help: D_T is not above 0"
    if amount / data > low_data:
        return f"D_F / D_E is {amount / data:.2f}, above {low_data:g}"
    return ""


def fit_transfer(effective: list[Effective]) -> TransferLaw:
    """D_T = k D_F^alpha N^beta by least squares of the logarithms, over the entries without a
    reason.

    Raises:
      ValueError: Too few entries; the text says what is missing.
    """
    used = [e for e in effective if not e.reason]
    _require_entries(effective, used)
    columns = [[1.0, np.log(e.finetune_tokens), np.log(e.num_params)] for e in used]
    log_k, alpha, beta = np.linalg.lstsq(
        np.array(columns), np.log([e.transferred for e in used]), rcond=None
    )[0]
    return TransferLaw(k=float(np.exp(log_k)), alpha=float(alpha), beta=float(beta))


def _require_entries(effective: list[Effective], used: list[Effective]) -> None:
    have = {
        "usable cells": (len(used), 4),
        "sizes": (len({e.num_params for e in used}), 2),
        "amounts of finetuning data": (len({e.finetune_tokens for e in used}), 2),
    }
    missing = [
        f"{needed - there} more {what} ({there} of at least {needed})"
        for what, (there, needed) in have.items()
        if there < needed
    ]
    if missing:
        why = "; ".join(
            f"N = {e.num_params:.3g}, D_F = {e.finetune_tokens:.3g}: {e.reason}"
            for e in effective
            if e.reason
        )
        text = f"ledger: too few runs for {TransferLaw.form}: missing {', '.join(missing)}"
        raise ValueError(f"{text}; excluded {why}" if why else text)


def bootstrap_transfer(
    scratch: Points,
    finetuned: Points,
    draws: int = 400,
    seed: int = 0,
    low_data: float = LOW_DATA,
) -> list[TransferLaw]:
    """Laws of runs drawn again: seeds inside each cell, of both kinds of runs, and then cells.

    Draws that leave too few usable cells are drawn again.

    Raises:
      ValueError: The runs themselves are too few.
    """
    fit_transfer(effective_data(scratch, finetuned, low_data))
    rng = np.random.default_rng(seed)
    laws: list[TransferLaw] = []
    for _ in range(100 * draws):
        if len(laws) == draws:
            break
        found = effective_data(
            scratch.take(_drawn_seeds(scratch, rng)),
            finetuned.take(_drawn_seeds(finetuned, rng)),
            low_data,
        )
        used = [e for e in found if not e.reason]
        try:
            laws.append(fit_transfer([used[i] for i in rng.choice(len(used), len(used))]))
        except ValueError:
            continue
    if len(laws) < draws:
        raise ValueError("ledger: hardly any draw of the runs can be fitted; more cells are needed")
    return laws


def _drawn_seeds(points: Points, rng: np.random.Generator) -> np.ndarray:
    """Runs drawn with replacement inside each cell of size and data."""
    cell = np.unique(
        np.stack([points.num_params, points.unique_tokens]), axis=1, return_inverse=True
    )[1].ravel()
    groups = [np.flatnonzero(cell == number) for number in range(cell.max() + 1)]
    return np.concatenate([rng.choice(group, len(group)) for group in groups])
