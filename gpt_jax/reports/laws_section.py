"""Laws fitted to the runs of a report: isoFLOP curves, L(C) and L(N, D), intervals, residuals."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt_jax.reports.figures import Figure
from gpt_jax.reports.law_figures import compute_figure, isoflop_figure, residual_figure
from gpt_jax.reports.page import figure_html, heading, paragraph
from gpt_jax.reports.tables import Cell, scientific, table
from gpt_jax.scaling.bootstrap import Bootstrap, interval
from gpt_jax.scaling.fits import predicted
from gpt_jax.scaling.fitted import LEVEL, fit_law, ladder_points
from gpt_jax.scaling.optima import fit_minima, frontier, isoflop_minima
from gpt_jax.scaling.points import Points, budgets, reason_against

_FEWEST_SIZES = 3  # with fewer, nobody meant to fit anything
_LINE = 40  # points of a law's line
_BEYOND = 10.0  # so many times the largest budget the law is shown
_SHARE = f"{LEVEL:.0%}"


@dataclasses.dataclass(frozen=True)
class Laws:
    """What a report shows of laws.

    Attributes:
      markup: Of the section; "": nothing could be fitted.
      figures: In it.
      excluded: {run: why it is not in the fits}.
      refusal: Why nothing was fitted; "" if something was, or nobody would expect it.
    """

    markup: str = ""
    figures: tuple[Figure, ...] = ()
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refusal: str = ""


def laws_section(
    rows: list[dict[str, Any]], palette: Mapping[str, str], min_tokens: int = 0
) -> Laws:
    """Fits what the runs allow, and shows it.

    Runs whose loss was predicted are held out: a law that has seen them says nothing about them.

    Args:
      rows: As in a ledger.
      palette: Colours by run's name.
      min_tokens: Runs that saw fewer are left out, as of ladder_points.
    """
    ladder = [row for row in rows if not row.get("prediction_sha256")]
    if len({row.get("num_params") for row in ladder}) < _FEWEST_SIZES:
        return Laws()
    try:
        points = ladder_points(rows, min_tokens=min_tokens)
    except ValueError as error:
        return Laws(refusal=_refusal("No law", error))
    parts, figures, refusals = [], [], []
    for what, show in (
        ("No isoFLOP curve", _isoflop),
        ("No L(C)", functools.partial(_compute_law, held_out=_held_out(rows))),
        ("No L(N, D)", _param_data_law),
    ):
        try:
            markup, figure = show(points, palette)
        except ValueError as error:
            refusals.append(_refusal(what, error))
            continue
        parts.append(markup)
        figures.append(figure)
    if not figures:
        return Laws(refusal=" ".join(refusals))
    notes = [paragraph(words, soft=True) for words in refusals]
    return Laws("\n".join([*parts, *notes]), tuple(figures), dict(points.excluded))


def _refusal(what: str, error: ValueError) -> str:
    reason = str(error).removeprefix("ledger: ").rstrip(".")
    return f"{what} was fitted: {reason}."


def _isoflop(points: Points, palette: Mapping[str, str]) -> tuple[str, Figure]:
    """Loss by size for each budget with a minimum, and how the best size grows."""
    minima = isoflop_minima(points)
    best_params, best_tokens = fit_minima(minima)
    shown = [i for i, minimum in enumerate(minima) if not minimum.reason]
    groups, parabolas = [], []
    for i, runs in enumerate(budgets(points.flops)):
        if i in shown:
            of_budget = [(points.names[r], points.num_params[r], points.loss[r]) for r in runs]
            groups.append((minima[i].flops, of_budget))
            parabolas.append(_parabola(of_budget))
    ends = [(minima[i].num_params, minima[i].loss) for i in shown]
    figure = isoflop_figure(groups, parabolas, ends, "parameters")
    rows = [
        [
            Cell(m.flops, scientific(m.flops)),
            *(Cell(x, scientific(None if m.reason else x)) for x in (m.num_params, m.num_tokens)),
            Cell(m.loss, f"{m.loss:.4f}"),
            m.reason or "inside of the sizes",
        ]
        for m in minima
    ]
    titles = ["FLOPs", "best parameters", "tokens", "loss", "minimum"]
    words = (
        f"By the minima, the best number of parameters grows as C^{best_params.p:.3f} and that of "
        f"tokens as C^{best_tokens.p:.3f}."
    )
    markup = heading("Best size of a budget") + paragraph(words) + table(titles, rows)
    return markup + figure_html(figure), figure


def _parabola(runs: list[tuple[str, float, float]]) -> tuple[float, float, float]:
    """As optima.isoflop_minima has it: through the best run of each size."""
    best: dict[float, float] = {}
    for _, size, loss in runs:
        best[size] = min(loss, best.get(size, np.inf))
    square, linear, constant = np.polyfit(np.log(list(best)), list(best.values()), 2)
    return float(square), float(linear), float(constant)


def _held_out(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(run, FLOPs, loss) of finished runs that were predicted."""
    return [
        (row["name"], row["flops"], row["loss"])
        for row in rows
        if row.get("prediction_sha256") and not reason_against(row)
    ]


def _compute_law(
    points: Points, palette: Mapping[str, str], held_out: list[tuple[str, float, float]]
) -> tuple[str, Figure]:
    """L(C) through the best run of each budget."""
    found = fit_law("compute", points).found
    best = frontier(points)
    line = np.geomspace(points.flops.min(), _BEYOND * points.flops.max(), _LINE)
    low, high = interval(found, lambda law: law.predict(line), LEVEL)
    figure = compute_figure(
        list(zip(points.names, points.flops, points.loss, strict=True)),
        list(zip(best.flops, best.loss, strict=True)),
        held_out,
        list(zip(line, found.law.predict(line), low, high, strict=True)),
        LEVEL,
        "A power law of the lowest loss of each budget, up to ten times the largest budget. The "
        "interval is for the loss of a new run.",
    )
    title = heading("Loss by compute: " + found.law.form)
    return title + _constants(found) + _fit_words(found, best) + figure_html(figure), figure


def _param_data_law(points: Points, palette: Mapping[str, str]) -> tuple[str, Figure]:
    """L(N, D) through all runs."""
    found = fit_law("param_data", points).found
    figure = residual_figure(
        list(
            zip(points.names, points.flops, points.loss, predicted(found.law, points), strict=True)
        ),
        palette,
        "L(N, D)",
    )
    parts = [
        heading("Loss by parameters and tokens: " + found.law.form),
        _constants(found),
        _fit_words(found, points),
        _optima(points, found),
        figure_html(figure),
    ]
    return "".join(parts), figure


def _constants(found: Bootstrap) -> str:
    """A law's constants with intervals over runs drawn again."""
    rows = []
    for field in dataclasses.fields(found.law):
        low, high = found.spread(lambda law, name=field.name: getattr(law, name), LEVEL)
        numbers = (getattr(found.law, field.name), low, high)
        rows.append([field.name, *(Cell(float(x), f"{x:.4g}") for x in numbers)])
    return table(["constant", "fitted", f"{_SHARE} from", f"{_SHARE} to"], rows)


def _fit_words(found: Bootstrap, points: Points) -> str:
    return paragraph(
        f"{len(points)} runs; one lies {found.noise:.2%} from the law (standard deviation of the "
        f"logarithm). Intervals: {len(found.laws)} fits to runs drawn again, seed {found.seed}.",
        soft=True,
    )


def _optima(points: Points, found: Bootstrap) -> str:
    """The best size and tokens, by the law, for budgets of the runs and one beyond."""
    cost = float(np.median(points.flops / (points.num_params * points.num_tokens)))
    low, high = points.flops.min(), _BEYOND * points.flops.max()
    rows = []
    try:
        for flops in np.geomspace(low, high, round(np.log10(high / low)) + 1):
            params, tokens = found.law.optimum(flops, cost)
            loss = float(found.law.predict(params, tokens))
            ends = interval(found, lambda law, p=params, d=tokens: law.predict(p, d), LEVEL)
            cells = (scientific(x) for x in (flops, params, tokens))
            values = (float(x) for x in (flops, params, tokens))
            rows.append(
                [
                    *map(Cell, values, cells),
                    Cell(float(tokens / params), f"{tokens / params:.3g}"),
                    *(Cell(float(x), f"{x:.4f}") for x in (loss, *ends)),
                ]
            )
        low, high = found.spread(lambda law: law.params_exponent, LEVEL)
    except ValueError as error:  # no optimum: one term is nothing
        return paragraph(str(error))
    titles = ["FLOPs", "best parameters", "tokens", "tokens a parameter", "loss"]
    words = (
        f"By this law the best number of parameters grows as C^{found.law.params_exponent:.3f} "
        f"({_SHARE}: {low:.3f} to {high:.3f}), at {cost:.3g} FLOPs for a parameter and a token, "
        "the median of the runs. N counts all parameters."
    )
    return paragraph(words) + table([*titles, f"{_SHARE} from", f"{_SHARE} to"], rows)
