"""What was predicted of the runs of a report, beside what came."""

import dataclasses
from collections.abc import Mapping

from gpt_jax.reports.figures import Figure
from gpt_jax.reports.report_runs import ReportRun


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a report shows of predictions.

    Attributes:
      markup: Of the section; "": no run has a prediction.
      figures: In it.
    """

    markup: str = ""
    figures: tuple[Figure, ...] = ()


def predictions_section(runs: list[ReportRun], palette: Mapping[str, str]) -> Predictions:
    """Predicted and actual losses of the runs that have a prediction."""
    return Predictions()
