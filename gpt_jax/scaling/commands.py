"""What `gpt-jax scaling` does: lines to print, and the files beside them.  Starts no JAX."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.ledger import read_ledger
from gpt_jax.scaling import prediction, wording
from gpt_jax.scaling.fitted import LEVEL, check_law, fit_law, ladder_points
from gpt_jax.scaling.predicting import make_prediction


def fit(
    ledger: str, names: Sequence[str], out: str = "", *, params: str, min_tokens: int
) -> list[str]:
    """Fits laws to a ledger.

    Args:
      ledger: The file.
      names: Of laws: scaling.fitted.LAWS.
      out: Where the laws are written as JSON; "": nowhere.
      params, min_tokens: As of ladder_points.

    Raises:
      ValueError: An unknown law, or none that can be fitted. Where others can be, one for which
        the runs are too few is told among the lines.
    """
    for name in names:
        check_law(name)
    points = ladder_points(read_ledger(ledger), params, min_tokens=min_tokens)
    lines = [f"{len(points)} runs, N is {params}", *wording.excluded_lines(points.excluded)]
    laws, refused = [], []
    for name in names:
        try:
            laws.append(wording.law_values(fit_law(name, points)))
            lines += wording.law_lines(laws[-1])
        except ValueError as error:
            refused.append({"law": name, "reason": str(error)})
            lines.append(f"no {name}: {wording.reason_of(error)}")
    if not laws:
        raise ValueError(refused[0]["reason"] if refused else "law: '' names none")
    if out:
        excluded = [{"name": name, "reason": reason} for name, reason in points.excluded]
        values = {"params": params, "min_tokens": min_tokens, "level": LEVEL, "laws": laws}
        values |= {"refused": refused, "used": list(points.names), "excluded": excluded}
        pathlib.Path(out).write_text(json.dumps(values, indent=2) + "\n")
    return [*lines, *wording.minima_lines(points)]


def predict(config: RunConfig, ledger: str, workdir: pathlib.Path, **how: Any) -> list[str]:
    """Writes the prediction of a run; see make_prediction and write_prediction.

    Args:
      config: The run's, resolved.
      ledger: The file.
      workdir: Where the run will lie.
      how: params, measures, min_tokens of make_prediction.
    """
    prediction.check_unwritten(workdir)
    begun = prediction.has_begun(workdir)
    made = make_prediction(config, ledger, made_after_the_run=begun, **how)
    sha256 = prediction.write_prediction(workdir, made)
    return [*wording.prediction_lines(made), f"sha256: {sha256}   {workdir / prediction.FILE}"]


def score(run: str) -> list[str]:
    """Compares a finished run with its prediction; see scaling.prediction.score."""
    return list(wording.score_lines(prediction.score(run)))
