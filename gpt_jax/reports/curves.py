"""Loss curves of several runs, by tokens and by FLOPs."""

from gpt_jax.reports.figures import Figure, Series
from gpt_jax.reports.report_runs import ReportRun

_MOST_POINTS = 200  # of a curve: more cannot be told apart in a figure
_CAPTION = (
    "Nats a token. Thick with points: the validation split; thin: training, as the mean of "
    "neighbouring rows where there are many."
)


def loss_curves(runs: list[ReportRun], colors: dict[str, str]) -> list[Figure]:
    """One figure by tokens, one by FLOPs; [] where no run has a curve.

    Args:
      runs: In the order of the legend.
      colors: By run's name.
    """
    by_tokens = _series(runs, colors, {run.name: 1.0 for run in runs})
    costs = {run.name: run.flops_per_token for run in runs if run.flops_per_token}
    by_flops = _series([run for run in runs if run.name in costs], colors, costs)
    figures = []
    if by_tokens:
        figures.append(
            Figure("loss_by_tokens", "Loss by tokens", _CAPTION, "tokens trained on",
                   "loss (nats a token)", by_tokens, x_log=len(runs) > 1)
        )  # fmt: skip
    if by_flops:
        figures.append(
            Figure("loss_by_flops", "Loss by FLOPs", _CAPTION, "training FLOPs",
                   "loss (nats a token)", by_flops, x_log=len(runs) > 1)
        )  # fmt: skip
    return figures


def _series(
    runs: list[ReportRun], colors: dict[str, str], scale: dict[str, float]
) -> tuple[Series, ...]:
    found = []
    for run in runs:
        curves = (("both", "validation", run.held_out), ("faint", "training", run.train))
        named = False  # a run is in the legend once, whatever it has
        for style, split, curve in curves:
            points = thinned(curve)
            if points:
                xs = tuple(x * scale[run.name] for x, _ in points)
                ys = tuple(y for _, y in points)
                # Two names where one run is alone, for its legend.
                name = split if len(runs) == 1 else run.name
                legend = len(runs) == 1 or not named
                found.append(Series(name, xs, ys, colors[run.name], style, run.name, legend=legend))
                named = True
    return tuple(found)


def thinned(
    curve: tuple[tuple[float, float], ...], most: int = _MOST_POINTS
) -> list[tuple[float, float]]:
    """At most so many points, each the mean of neighbours; without places that are not positive."""
    points = [(x, y) for x, y in curve if x > 0]
    if len(points) <= most:
        return points
    found = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return found
