"""From the rows of a ledger to the points of a fit; what is left out is named with its reason."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
COUNTS = ("num_params", "num_params_non_embedding")


@dataclasses.dataclass(frozen=True)
class Points:
    """Finished runs, one entry a run, and the excluded ones as (name, reason).

    unique_tokens is below num_tokens where a run saw its data more than once.
    """

    names: tuple[str, ...]
    num_params: np.ndarray
    num_tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    excluded: tuple[tuple[str, str], ...] = ()
    unique_tokens: np.ndarray | None = None

    def __post_init__(self):
        if self.unique_tokens is None:
            object.__setattr__(self, "unique_tokens", self.num_tokens)
        for field in ("num_params", "num_tokens", "flops", "loss", "unique_tokens"):
            numbers = np.asarray(getattr(self, field), float)
            if numbers.shape != (len(self.names),):
                raise ValueError(f"{field}: {numbers.shape} numbers for {len(self.names)} runs")
            object.__setattr__(self, field, numbers)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Points":
        """The runs with these numbers, in this order; a number may stand twice."""
        rows = np.asarray(rows, int)
        return dataclasses.replace(
            self,
            names=tuple(self.names[row] for row in rows),
            num_params=self.num_params[rows],
            num_tokens=self.num_tokens[rows],
            flops=self.flops[rows],
            loss=self.loss[rows],
            unique_tokens=self.unique_tokens[rows],
        )

    def where(self, keep: np.ndarray, reason: str) -> "Points":
        """The runs where `keep` is true; the others join `excluded` with the reason."""
        dropped = tuple(
            (name, reason) for name, kept in zip(self.names, keep, strict=True) if not kept
        )
        kept = self.take(np.flatnonzero(keep))
        return dataclasses.replace(kept, excluded=self.excluded + dropped)


def points_of(rows: Iterable[Row], *, params: str = "num_params", loss: str = "loss") -> Points:
    """The points of a ledger.

    Args:
      rows: Rows of runs.ledger.read_ledger.
      params: Which count is N: "num_params" or "num_params_non_embedding".
      loss: The key of the measure: "loss", "best_loss", "bits_per_byte".

    Returns:
      Points in the rows' order. Excluded is what did not finish, diverged, or has no finite
      measure.

    Raises:
      ValueError: An unknown count, or no run is left; the text names the excluded ones.
    """
    if params not in COUNTS:
        raise ValueError(f"params: {params!r} is not one of {', '.join(COUNTS)}")
    kept, excluded = [], []
    for row in rows:
        reason = reason_against(row, params, loss)
        if reason:
            excluded.append((str(row.get("name")), reason))
        else:
            kept.append(row)
    if not kept:
        seen = "; ".join(f"{name}: {reason}" for name, reason in excluded)
        raise ValueError(
            f"ledger: no finished run to fit{f' ({seen})' if seen else ', it is empty'}"
        )

    def column(key: str) -> np.ndarray:
        return np.array([float(row[key]) for row in kept])

    tokens = column("num_tokens")
    epochs = np.array([max(float(row.get("epochs") or 1), 1.0) for row in kept])
    return Points(
        names=tuple(str(row["name"]) for row in kept),
        num_params=column(params),
        num_tokens=tokens,
        flops=column("flops"),
        loss=column(loss),
        excluded=tuple(excluded),
        unique_tokens=tokens / epochs,
    )


def reason_against(row: Row, params: str = "num_params", loss: str = "loss") -> str:
    """Why a row of a ledger is no point of a fit; empty where it is one."""
    status = row.get("status")
    if status != "finished":
        return {"diverged": "diverged", "failed": "failed"}.get(
            status, f"not finished ({status or 'no status'})"
        )
    for key in (params, "num_tokens", "flops", loss):
        value = row.get(key)
        if value is None:
            return f"{key} is missing"
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            return f"{key} is {value}"
    return ""


def require(points: Points, law: str, *, runs: int, sizes: int = 1, amounts: int = 1) -> None:
    """Checks that a law can be told by the points.

    Args:
      points: The runs.
      law: Its name, for the message.
      runs: Least number of runs: above the number of the law's constants.
      sizes: Least number of different num_params.
      amounts: Least number of different num_tokens.

    Raises:
      ValueError: Too few; the text says how many of what are there, how many are missing, and what
        was excluded.
    """
    have = {
        "runs": (len(points), runs),
        "sizes": (len(np.unique(points.num_params)), sizes),
        "amounts of tokens": (len(np.unique(points.num_tokens)), amounts),
    }
    missing = [
        f"{needed - there} more {what} ({there} of at least {needed})"
        for what, (there, needed) in have.items()
        if there < needed
    ]
    if missing:
        text = f"ledger: too few runs for {law}: missing {', '.join(missing)}"
        if points.excluded:
            dropped = "; ".join(f"{name}: {reason}" for name, reason in points.excluded)
            text += f"; excluded {dropped}"
        raise ValueError(text)


def budgets(flops: np.ndarray, tolerance: float = 0.25) -> list[np.ndarray]:
    """Numbers of the runs of each budget, from the smallest on.

    Runs planned for one budget differ a little, as sizes and steps are whole numbers: a budget
    holds what lies within `tolerance` of its smallest run.
    """
    found: dict[float, list[int]] = collections.OrderedDict()
    for run in np.argsort(flops, kind="stable"):
        if found and flops[run] <= (1 + tolerance) * next(reversed(found)):
            found[next(reversed(found))].append(int(run))
        else:
            found[float(flops[run])] = [int(run)]
    return [np.array(runs) for runs in found.values()]
