"""A figure as data, drawn twice: by plotly in a page, by matplotlib as PNG."""

import copy
import dataclasses
import html
import math
from typing import Any

from etils import epath

# Told apart by people who see colours differently too (Okabe and Ito), darkest first.
_FEW = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#7b3294")
# From dark to light, for more runs than there are colours: their order then says their cost.
_MANY = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (222, 190, 30))
FEW_COLORS = len(_FEW)
_MOST_IN_LEGEND = 16


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or one set of points.

    Attributes:
      name: In the legend and on hovering.
      x, y: Numbers; equally many.
      color: "#rrggbb".
      style: "line", "faint", "dashed", "points", "crosses" or "both" (a line with points).
      run: The run that it belongs to: it goes when the run is unticked. "": it stays.
      labels: What hovering says of each point; () or as many as x.
      legend: Whether the legend has it.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: str
    style: str = "line"
    run: str = ""
    labels: tuple[str, ...] = ()
    legend: bool = True


@dataclasses.dataclass(frozen=True)
class Figure:
    """Attributes:
    key: Name of the PNG without its ending, and the id in the page.
    title, caption: Text.
    x_label, y_label: With units.
    series: What is drawn.
    x_log, y_log: Whether the axis is logarithmic at first.
    x_names: What stands at 1, 2, ... of the x axis instead of numbers; (): numbers.
    view: What is shown at first: x from, to, y from, to; None: all.
    """

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    x_names: tuple[str, ...] = ()
    view: tuple[float, float, float, float] | None = None


def colors(count: int) -> list[str]:
    """So many colours: told apart if few, else a scale from dark to light."""
    if count <= len(_FEW):
        return list(_FEW[:count])
    found = []
    for i in range(count):
        place = i / (count - 1) * (len(_MANY) - 1)
        low = min(int(place), len(_MANY) - 2)
        mixed = (
            round(a + (b - a) * (place - low))
            for a, b in zip(_MANY[low], _MANY[low + 1], strict=True)
        )
        found.append("#" + "".join(f"{part:02x}" for part in mixed))
    return found


def rounded(value: float, digits: int = 6) -> float:
    """To so many digits that count: pages stay small."""
    return float(f"{value:.{digits}g}")


_PLOTLY = {
    "line": {"mode": "lines", "line": {"width": 2}},
    "faint": {"mode": "lines", "line": {"width": 1}, "opacity": 0.4},
    "dashed": {"mode": "lines", "line": {"width": 2, "dash": "dash"}},
    "points": {"mode": "markers", "marker": {"size": 8}},
    "crosses": {"mode": "markers", "marker": {"size": 12, "symbol": "x"}},
    "both": {"mode": "lines+markers", "line": {"width": 2}, "marker": {"size": 5}},
}


def plotly(figure: Figure) -> dict[str, Any]:
    """The figure as plotly.js takes it: {key, data, layout}.

    Text is escaped: plotly reads some tags and entities in names.
    """
    data = []
    for series in figure.series:
        how = copy.deepcopy(_PLOTLY[series.style])
        for part in ("line", "marker"):
            if part in how:
                how[part]["color"] = series.color
        trace = {
            "type": "scatter",
            "name": html.escape(series.name),
            "x": [rounded(x) for x in series.x],
            "y": [rounded(y) for y in series.y],
            "hovertemplate": "%{x:.4s}, %{y:.4f}" + ("<br>%{text}" if series.labels else ""),
            "showlegend": series.legend and _legend(figure),
            **({"meta": series.run, "legendgroup": html.escape(series.run)} if series.run else {}),
            **how,
        }
        if series.labels:
            trace["text"] = [html.escape(label) for label in series.labels]
        data.append(trace)
    layout = {
        "xaxis": _axis(figure.x_label, figure.x_log, figure.view and figure.view[:2]),
        "yaxis": _axis(figure.y_label, figure.y_log, figure.view and figure.view[2:]),
        "showlegend": _legend(figure),
    }
    if figure.x_names:
        names = [html.escape(name) for name in figure.x_names]
        layout["xaxis"] |= {"tickvals": list(range(1, len(names) + 1)), "ticktext": names}
    return {"key": figure.key, "data": data, "layout": layout}


def _axis(label: str, is_log: bool, shown: tuple[float, ...] | None) -> dict[str, Any]:
    axis = {"title": {"text": html.escape(label)}, "type": "log" if is_log else "linear"}
    if shown:
        axis["range"] = [rounded(math.log10(end) if is_log else end) for end in shown]
    return axis


def _legend(figure: Figure) -> bool:
    return 1 < sum(series.legend for series in figure.series) <= _MOST_IN_LEGEND


_MATPLOTLIB = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.8, "alpha": 0.4},
    "dashed": {"linewidth": 1.6, "linestyle": "--"},
    "points": {"linestyle": "", "marker": "o", "markersize": 5},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 9, "markeredgewidth": 2},
    "both": {"linewidth": 1.6, "marker": "o", "markersize": 3.5},
}


def draw_png(figure: Figure, folder: epath.PathLike) -> epath.Path:
    """Writes KEY.png into the folder, which exists; returns its path."""
    from matplotlib import figure as drawing
    from matplotlib.ticker import LogLocator

    canvas = drawing.Figure(figsize=(7, 4.5), dpi=140, layout="constrained")
    axes = canvas.subplots()
    for series in figure.series:
        how = {"color": series.color, **_MATPLOTLIB[series.style]}
        # A name that begins with _ is left out by matplotlib, and $ begins a formula.
        name = series.name.replace("$", r"\$").lstrip("_") if series.legend else None
        axes.plot(series.x, series.y, label=name, **how)
    for side, is_log in (("x", figure.x_log), ("y", figure.y_log)):
        if is_log and all(_positive(s, side) for s in figure.series):
            axes.set(**{f"{side}scale": "log"})
            # Labels of 2 and 5 between the powers: more would overlap.
            getattr(axes, f"{side}axis").set_minor_locator(LogLocator(subs=(2, 5)))
    title = figure.title.replace("$", r"\$")
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label, title=title)
    if figure.x_names:
        names = [name.replace("$", r"\$") for name in figure.x_names]
        axes.set_xticks(range(1, len(names) + 1), names, rotation=20, ha="right")
    axes.grid(alpha=0.3)
    if figure.view:
        axes.set(xlim=figure.view[:2], ylim=figure.view[2:])
    if _legend(figure):
        axes.legend(fontsize=8)
    path = epath.Path(folder) / f"{figure.key}.png"
    canvas.savefig(path, format="png")
    return path


def _positive(series: Series, side: str) -> bool:
    return all(value > 0 and math.isfinite(value) for value in getattr(series, side))
