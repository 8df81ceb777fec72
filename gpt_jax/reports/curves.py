"""Loss curves of several runs, by tokens and by FLOPs."""

import math

from gpt_jax.reports.figures import Figure, Series
from gpt_jax.reports.report_runs import ReportRun

_MOST_POINTS = 160  # of a curve: more cannot be told apart in a figure
_MOST_BINS = 50  # of a curve among others: the noise of batches hides the others
_CAPTION = (
    "Thick with points: the validation split; thin: training, the mean of neighbouring rows. "
    "The beginning of training may lie outside; a double click shows all."
)

_Curve = tuple[tuple[float, float], ...]


def loss_curves(runs: list[ReportRun], colors: dict[str, str]) -> list[Figure]:
    """One figure by tokens, one by FLOPs; [] where no run has a curve.

    Args:
      runs: In the order of the legend.
      colors: By run's name.
    """
    tokens = {run.name: 1.0 for run in runs}
    costs = {run.name: run.flops_per_token for run in runs if run.flops_per_token}
    figures = []
    for key, title, label, scale in (
        ("loss_by_tokens", "Loss by tokens", "tokens trained on", tokens),
        ("loss_by_flops", "Loss by FLOPs", "training FLOPs", costs),
    ):
        series = _series([run for run in runs if run.name in scale], colors, scale)
        if series:
            figures.append(
                Figure(
                    key, title, _CAPTION, label, "loss (nats a token)", series,
                    x_log=len(runs) > 1, view=_view(series),
                )
            )  # fmt: skip
    return figures


def _series(
    runs: list[ReportRun], colors: dict[str, str], scale: dict[str, float]
) -> tuple[Series, ...]:
    alone = len(runs) == 1  # then the legend tells the splits apart
    found = []
    for run in runs:
        train = ("faint", "training", _training(run, alone))
        held_out = ("both", "validation", thinned(run.held_out, is_log=False))
        curves = [curve for curve in (held_out, train) if curve[2]]
        for i, (style, split, points) in enumerate(curves):
            xs = tuple(x * scale[run.name] for x, _ in points)
            ys = tuple(y for _, y in points)
            name = split if alone else run.name
            legend = alone or i == 0  # a run is in the legend once
            found.append(Series(name, xs, ys, colors[run.name], style, run.name, legend=legend))
    return tuple(found)


def _view(series: tuple[Series, ...]) -> tuple[float, float, float, float] | None:
    """Where what is told apart lies: not much above the validation losses."""
    ends = [y for s in series if s.style == "both" for y in s.y]
    if not ends:
        return None
    lowest = min(y for s in series for y in s.y)
    top = max(ends) + 0.3 * max(max(ends) - lowest, 0.1)
    xs = [x for s in series for x, y in zip(s.x, s.y, strict=True) if y <= top]
    margin = 0.03 * (top - lowest)
    return 0.97 * min(xs), 1.03 * max(xs), lowest - margin, top


def _training(run: ReportRun, alone: bool) -> list[tuple[float, float]]:
    if alone:
        return thinned(run.train, is_log=False)
    return thinned(run.train, is_log=True, most=_MOST_BINS)


def thinned(curve: _Curve, *, is_log: bool, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of neighbours.

    Args:
      curve: By rising x; where x is not positive, a logarithmic axis has no place.
      is_log: Whether neighbours are those on a logarithmic axis, else equally many rows.
      most: So many.
    """
    points = [(x, y) for x, y in curve if x > 0]
    if len(points) <= most:
        return points
    low, high = math.log(points[0][0]), math.log(points[-1][0])
    bins: dict[int, list[tuple[float, float]]] = {}
    for i, (x, y) in enumerate(points):
        place = i * most // len(points)
        if is_log:
            place = min(int((math.log(x) - low) / (high - low or 1.0) * most), most - 1)
        bins.setdefault(place, []).append((x, y))
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in bins.values()
    ]
