"""Figures of fitted laws, from numbers: isoFLOP curves, loss by compute, residuals."""

from collections.abc import Mapping, Sequence

import numpy as np

from gpt_jax.reports.figures import Figure, Series, colors

_LINE = 60  # points of a law's line
_GREY, _BLUE, _RED, _BLACK = "#8a939c", "#0072b2", "#d55e00", "#1c2024"


def isoflop_figure(
    groups: Sequence[tuple[float, Sequence[tuple[str, float, float]]]],
    parabolas: Sequence[tuple[float, float, float]],
    minima: Sequence[tuple[float, float]],
    x_label: str,
) -> Figure:
    """Loss by size, a curve a budget, the minima marked.

    Args:
      groups: (FLOPs, [(run, parameters, loss), ...]) of each budget.
      parabolas: Loss as a parabola of the natural logarithm of parameters, of each budget: the
        factors of its square, of itself, and the constant.
      minima: (parameters, loss) of each budget.
      x_label: What is counted as parameters.
    """
    series = []
    palette = colors(len(groups))
    for (flops, runs), parabola, color in zip(groups, parabolas, palette, strict=True):
        names, sizes, losses = zip(*sorted(runs, key=lambda run: run[1]), strict=True)
        name = f"{flops:.2g} FLOPs".replace("e+", "e")
        # Each run apart, so that the list of runs can take it away.
        for i, run in enumerate(names):
            series.append(
                Series(
                    name, sizes[i : i + 1], losses[i : i + 1], color, "points", run,
                    labels=(run,), legend=i == 0,
                )
            )  # fmt: skip
        line = np.geomspace(sizes[0], sizes[-1], _LINE)
        at = np.polyval(parabola, np.log(line))
        series.append(Series(name, tuple(line), tuple(at), color, "line", legend=False))
    sizes, losses = zip(*minima, strict=True)
    labels = tuple(f"best size of {flops:.2g} FLOPs" for flops, _ in groups)
    series.append(Series("minimum", sizes, losses, _BLACK, "crosses", labels=labels))
    return Figure(
        "isoflop", "IsoFLOP curves",
        "Each curve is of one budget; a parabola in the logarithm of the size, and its minimum.",
        x_label, "loss (nats a token)", tuple(series), x_log=True,
    )  # fmt: skip


def compute_figure(
    runs: Sequence[tuple[str, float, float]],
    fitted: Sequence[tuple[float, float]],
    held_out: Sequence[tuple[str, float, float]],
    line: Sequence[tuple[float, float, float, float]],
    level: float,
    caption: str,
) -> Figure:
    """Loss by FLOPs: all runs, those that a law was fitted to, the law and its interval.

    Args:
      runs: (run, FLOPs, loss).
      fitted: (FLOPs, loss).
      held_out: (run, FLOPs, loss) of runs that were predicted, and are in no fit.
      line: (FLOPs, loss, low, high) along the law.
      level: Of the interval.
      caption: Says what was fitted.
    """
    xs, ys, lows, highs = zip(*line, strict=True)
    series = [
        Series("runs", (x,), (y,), _GREY, "points", run, labels=(run,), legend=i == 0)
        for i, (run, x, y) in enumerate(runs)
    ]
    series += [
        Series("fitted", *zip(*fitted, strict=True), _RED, "crosses"),
        *(
            Series(f"{run}, predicted", (x,), (y,), _BLACK, "crosses", run)
            for run, x, y in held_out
        ),
        Series("law", xs, ys, _BLUE),
        Series(f"{level:.0%} interval", xs, lows, _BLUE, "dashed"),
        Series(f"{level:.0%} interval", xs, highs, _BLUE, "dashed", legend=False),
    ]
    return Figure(
        "compute_law", "Loss by compute, and the law", caption, "training FLOPs",
        "loss (nats a token)", tuple(series), x_log=True,
    )  # fmt: skip


def residual_figure(
    runs: Sequence[tuple[str, float, float, float]], palette: Mapping[str, str], law: str
) -> Figure:
    """How far each run is from a law, in percent.

    Args:
      runs: (run, FLOPs, loss, predicted loss).
      palette: Colours by run's name.
      law: What it is called.
    """
    series = []
    for run, flops, loss, predicted in runs:
        away = 100 * (loss / predicted - 1)
        labels = (f"{run}: {loss:.4f}, by the law {predicted:.4f}",)
        series.append(
            Series(run, (flops,), (away,), palette[run], "points", run, labels=labels, legend=False)
        )
    ends = (min(run[1] for run in runs), max(run[1] for run in runs))
    series.append(Series("the law", ends, (0.0, 0.0), _GREY, "dashed", legend=False))
    return Figure(
        "residuals", f"Residuals of {law}",
        "Above 0: the run's loss is higher than the law says.", "training FLOPs",
        "loss against the law (%)", tuple(series), x_log=True,
    )  # fmt: skip
