"""What was predicted of the runs of a report, beside what came."""

import dataclasses
from collections.abc import Mapping

from gpt_jax.reports.figures import Figure, Series
from gpt_jax.reports.page import figure_html, paragraph
from gpt_jax.reports.report_runs import ReportRun
from gpt_jax.reports.tables import Cell, table
from gpt_jax.runs.ledger import FINISHED
from gpt_jax.scaling.prediction import Comparison, Score, read_prediction, score

_FORMS = ("#0072b2", "#009e73", "#cc79a7", "#8a939c")  # by the place of a law in the file
_ACTUAL = "#1c2024"
_SPREAD = 0.12  # how far the laws of one run are drawn from each other; runs are 1 apart


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
    """Predicted and actual losses of the runs that have a prediction.

    Args:
      runs: Those of a ledger alone have no prediction file to show.
      palette: Colours by run's name.
    """
    scores = [(run, found) for run in runs if (found := _score(run)) is not None]
    if not scores:
        return Predictions()
    rows, names = [], []
    for run, found in scores:
        for one in found.comparisons:
            rows.append([Cell(run.name, swatch=palette[run.name]), *_cells(one), *_made(found)])
            names.append(run.name)
    titles = ["run", "measure", "by", "predicted", "from", "to", "actual", "off by", "interval"]
    shown = table([*titles, "made", "sha256"], rows, runs=names)
    objections = "".join(
        paragraph(f"The prediction of {run.name}: {objection}.")
        for run, found in scores
        for objection in found.objections
    )
    figure = _figure(scores)
    return Predictions(shown + objections + figure_html(figure), (figure,))


def _score(run: ReportRun) -> Score | None:
    """The run's score; of a run that is not finished, what was predicted."""
    if run.folder is None:
        return None
    found = read_prediction(run.folder)
    if found is None:
        return None
    if run.row["status"] == FINISHED:
        return score(run.folder)
    prediction, sha256 = found
    comparisons = tuple(
        Comparison(
            one["measure"], one["law"], one["form"], one["value"], one["low"], one["high"], None
        )
        for one in prediction["predictions"]
    )
    marked = prediction.get("made_after_the_run")
    objections = ("it was made after the run had begun",) if marked else ()
    return Score(run.name, sha256, objections, comparisons)


def _cells(one: Comparison) -> list[Cell]:
    numbers = (one.predicted, one.low, one.high, one.actual)
    inside = {True: ("contains it", "good"), False: ("misses it", "bad"), None: ("", "")}
    words, tag = inside[one.is_inside]
    return [
        Cell(one.measure),
        Cell(one.form),
        *(Cell(x, None if x is None else f"{x:.4f}") for x in numbers),
        Cell(one.error, None if one.error is None else f"{one.error:+.2%}"),
        Cell(words, words or None, tag),
    ]


def _made(found: Score) -> list[Cell]:
    """Whether it counts as a prediction, and its digest."""
    if found.objections:
        words = Cell("; ".join(found.objections), "not before this run", "bad")
    else:
        words = Cell("before the run", tag="good")
    return [words, Cell(found.sha256, found.sha256[:12], hover=found.sha256)]


def _figure(scores: list[tuple[ReportRun, Score]]) -> Figure:
    """Predicted losses with their intervals and actual ones, a place for each run."""
    series, named = [], set()
    for place, (run, found) in enumerate(scores, start=1):
        losses = [one for one in found.comparisons if one.measure == "loss"]
        for i, one in enumerate(losses):
            x = place + _SPREAD * (i - (len(losses) - 1) / 2)
            color = _FORMS[min(i, len(_FORMS) - 1)]
            label = f"{run.name}: {one.predicted:.4f} ({one.low:.4f} to {one.high:.4f})"
            series += [
                Series(
                    one.form, (x,), (one.predicted,), color, "points", run.name,
                    labels=(label,), legend=one.form not in named,
                ),
                Series(
                    one.form, (x, x), (one.low, one.high), color, "line", run.name, legend=False
                ),
            ]  # fmt: skip
            named.add(one.form)
        if losses and losses[0].actual is not None:
            label = f"{run.name}: {losses[0].actual:.4f}"
            series.append(
                Series(
                    "actual", (float(place),), (losses[0].actual,), _ACTUAL, "crosses", run.name,
                    labels=(label,), legend="actual" not in named,
                )
            )  # fmt: skip
            named.add("actual")
    return Figure(
        "predictions", "Predicted and actual loss",
        "Points: predicted, with their intervals; crosses: what came.",
        "", "loss (nats a token)", tuple(series),
        x_names=tuple(run.name for run, _ in scores), view=_view(series, len(scores)),
    )  # fmt: skip


def _view(series: list[Series], num_runs: int) -> tuple[float, float, float, float] | None:
    ys = [y for s in series for y in s.y]
    if not ys:
        return None
    margin = 0.1 * (max(ys) - min(ys)) or 0.1
    return 0.5, num_runs + 0.5, min(ys) - margin, max(ys) + margin
