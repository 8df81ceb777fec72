"""Tables of a report: cells of a row, sortable by click; what differs between runs and what not."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.reports.page import folded, text

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NOTHING = "\N{EN DASH}"  # in a cell without a value
_DIGEST = re.compile(r"[0-9a-f]{32,}")
_LONG = 28  # characters: longer text may be broken into lines


def table(
    titles: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    runs: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
) -> str:
    """An HTML table, sortable by each column.

    Args:
      titles: Of the columns; the first one names the rows.
      rows: Values, or `Cell`s where a value is not shown as it is.
      runs: The run of each row, which goes when the run is unticked; (): no row goes.
      notes: What hovering over a title says.
    """
    cells = [[value if isinstance(value, Cell) else Cell(value) for value in row] for row in rows]
    numeric = [
        any(row[i].is_number for row in cells)
        and all(row[i].is_number or row[i].value is None for row in cells)
        for i in range(len(titles))
    ]
    head = "".join(
        f'<th{" class=number" if number else ""} scope="col"{_note(notes, title)}>'
        f'<button type="button">{text(title)}</button></th>'
        for title, number in zip(titles, numeric, strict=True)
    )
    lines = []
    for i, row in enumerate(cells):
        of_run = f' data-run="{text(runs[i])}"' if runs else ""
        inside = "".join(
            c.html(n, j == 0) for j, (c, n) in enumerate(zip(row, numeric, strict=True))
        )
        lines.append(f"<tr{of_run}>{inside}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _note(notes: Mapping[str, str] | None, title: str) -> str:
    return f' title="{text(notes[title])}"' if notes and title in notes else ""


class Cell:
    """A value of a table, how it is written and what kind of tag it is.

    Args:
      value: It is sorted by.
      shown: Text; None: the value, shortened.
      tag: "good", "bad" or "warn"; "": no tag.
      swatch: A colour before it.
      hover: What hovering says.
    """

    def __init__(
        self,
        value: Any,
        shown: str | None = None,
        tag: str = "",
        swatch: str = "",
        hover: str = "",
    ):
        self.value, self.tag, self.swatch, self.hover = value, tag, swatch, hover
        self.shown = short(value) if shown is None else shown

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, int | float) and not isinstance(self.value, bool)

    def html(self, number: bool, first: bool) -> str:
        """The cell; `number`: its column is of numbers; `first`: it names the row."""
        inside = text(self.shown)
        if self.tag:
            inside = f'<span class="tag {self.tag}">{inside}</span>'
        if self.swatch:
            inside = f'<span class="swatch" style="background:{self.swatch}"></span>{inside}'
        kinds = ("number",) if number else ("long",) if len(self.shown) > _LONG else ()
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        name, scope = ("th", ' scope="row"') if first else ("td", "")
        # What is not known, and NaN, which is not itself, have no place in an order.
        value = "" if self.value is None or self.value != self.value else _key(self.value)
        hover = f' title="{text(self.hover)}"' if self.hover else ""
        return f'<{name}{scope}{kind}{hover} data-value="{text(value)}">{inside}</{name}>'


def _key(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def short(value: Any) -> str:
    """A value as people write it: 4 digits that count, thousands as k, M, G, T."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    return str(value)


def _number(value: float) -> str:
    size = abs(value)
    if not math.isfinite(value) or size >= 1e15:
        return f"{value:.3g}"
    for unit, letter in _UNITS:
        if size >= unit:
            if isinstance(value, int) and size < 1e5:
                return f"{value:,}"
            return f"{value / unit:.4g}{letter}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def scientific(value: float | None) -> str:
    """1.5e+12 as 1.5e12."""
    return NOTHING if value is None else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def split(values: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is the same and what differs between runs.

    Args:
      values: {run: {field: value}}; a field that a run lacks differs.

    Returns:
      {field: value} that all have, and the names of the others, in the order they come.
    """
    fields = list(dict.fromkeys(field for of_run in values.values() for field in of_run))
    common, differing = {}, []
    for field in fields:
        found = [of_run.get(field, _Missing) for of_run in values.values()]
        if all(value == found[0] for value in found):
            common[field] = found[0]
        else:
            differing.append(field)
    return common, differing


class _Missing:
    """In the place of a value that a run does not have."""


def differences(
    values: Mapping[str, Mapping[str, Any]],
    colors: Mapping[str, str],
    what: str,
    is_open: bool = False,
) -> str:
    """A table of the fields that differ, by run; those that all share are folded below it.

    Args:
      values: {run: {field: value}}; a run without any has no line.
      colors: By run's name.
      what: What the fields are, for the words of the fold.
      is_open: Whether the fold is open at first.
    """
    values = {run: fields for run, fields in values.items() if fields}
    common, differing = split(values)
    shown = ""
    if differing:
        rows = [
            [Cell(run, swatch=colors[run]), *(_exact(values[run].get(f)) for f in differing)]
            for run in values
        ]
        shown = table(["run", *differing], rows, runs=list(values))
    if not common:
        return shown
    plain = table(["field", "value"], [[field, _exact(value)] for field, value in common.items()])
    words = (
        f"{len(common)} {what} that all runs share" if len(values) > 1 else f"{len(common)} {what}"
    )
    return shown + folded(words, plain, is_open)


def _exact(value: Any) -> Cell:
    """A setting is written as it was set, not shortened; of a digest its beginning."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return Cell(value, value[:12], hover=value)
    plain = value is None or value == "" or isinstance(value, list | tuple | dict)
    return Cell(value, short(value) if plain else str(value))
