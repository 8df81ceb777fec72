"""From what `--runs` names to what a report shows of each run.  Reads files, starts no device."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from gpt_jax.runs import ledger
from gpt_jax.runs.config import flatten
from gpt_jax.runs.metrics import read_rows

# As in runs/run.py, which starts JAX.
_CONFIG, _RECEIPT, _METRICS = "config.json", "receipt.json", "metrics.jsonl"
_LEDGER = "ledger.jsonl"


@dataclasses.dataclass(frozen=True)
class ReportRun:
    """One run of a report.

    Attributes:
      name: Its own within the report.
      row: As in a ledger (runs/ledger.py).
      config: {dotted field: value}; of a ledger's row what it overrides.
      train: (tokens, loss) in nats a token, in the order of training; without what is not finite.
      held_out: The same, on the split that the run goes by.
      receipt: receipt.json; of a ledger's row {}.
      folder: The run directory; None for a ledger's row.
    """

    name: str
    row: dict[str, Any]
    config: dict[str, Any]
    train: tuple[tuple[float, float], ...]
    held_out: tuple[tuple[float, float], ...]
    receipt: dict[str, Any]
    folder: epath.Path | None

    @property
    def flops_per_token(self) -> float | None:
        """Of forward and backward, by the rule of the receipt; None where it is not known."""
        if self.receipt.get("flops_per_token"):
            return float(self.receipt["flops_per_token"])
        flops, tokens = self.row.get("flops"), self.row.get("num_tokens")
        return flops / tokens if is_finite(flops) and tokens else None


def read_runs(places: list[str]) -> list[ReportRun]:
    """The runs of run directories, folders of them, and ledgers, sorted by name.

    Args:
      places: Paths. A folder is searched for run directories at any depth.

    Returns:
      At least one run. Two of one name get the name of the folder before theirs.

    Raises:
      ValueError: A path is not there, or holds no run.
    """
    found: dict[str, ReportRun] = {}
    for place in places:
        path = epath.Path(place)
        if not path.exists():
            raise ValueError(f"--runs: {place!r} is not there")
        try:
            runs = list(_of_folder(path) if path.is_dir() else _of_ledger(path))
        except ValueError as error:  # of other commands' options
            raise ValueError(re.sub("^--(run|ledger):", "--runs:", str(error))) from None
        if not runs:
            raise ValueError(f"--runs: {place!r} holds no run (no {_RECEIPT} in it or below)")
        found |= {str(run.folder or f"{place}:{run.name}"): run for run in runs}
    return _named_apart(list(found.values()))


def _of_folder(folder: epath.Path) -> Iterator[ReportRun]:
    known: dict[str, dict[str, Any]] = {}  # what only the sweep knows: groups, overrides
    for directory, below, files in os.walk(folder):
        if _CONFIG in files and _RECEIPT in files:
            below.clear()  # checkpoints are no runs
            path = epath.Path(directory)
            yield _of_directory(path, known.get(path.name, {}))
        elif _LEDGER in files:
            known |= {row["name"]: row for row in _rows(epath.Path(directory) / _LEDGER)}
        below.sort()


def _of_directory(path: epath.Path, known: dict[str, Any]) -> ReportRun:
    row = ledger.ledger_row(
        path,
        group=known.get("group") or "",
        overrides=known.get("overrides"),
        failed=known.get("status") == ledger.FAILED,
    )
    metrics = read_rows(path / _METRICS) if (path / _METRICS).exists() else []
    return ReportRun(
        name=row["name"],
        row=row,
        config=flatten(json.loads((path / _CONFIG).read_text())),
        train=_curve((r.get("train/tokens"), r.get("train/loss")) for r in metrics),
        held_out=_curve(row["curve"]),
        receipt=json.loads((path / _RECEIPT).read_text()),
        folder=path,
    )


def _of_ledger(path: epath.Path) -> Iterator[ReportRun]:
    for row in _rows(path):
        overrides = {k: v for k, v in (row.get("overrides") or {}).items() if k != "name"}
        yield ReportRun(
            row["name"], row, flatten(overrides), (), _curve(row.get("curve") or ()), {}, None
        )


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    try:
        return ledger.read_ledger(path)
    except UnicodeDecodeError:
        raise ValueError(f"--runs: {str(path)!r} is no ledger (it is not text)") from None


def _curve(pairs) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in pairs if is_finite(x) and is_finite(y))


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _named_apart(runs: list[ReportRun]) -> list[ReportRun]:
    names = [run.name for run in runs]
    taken: set[str] = set()
    apart = []
    for run in sorted(runs, key=lambda run: run.name):
        name = run.name
        if names.count(name) > 1 and run.folder is not None:
            name = f"{run.folder.parent.name}/{name}"
        number, free = 1, name
        while free in taken:
            number, free = number + 1, f"{name} ({number + 1})"
        taken.add(free)
        apart.append(dataclasses.replace(run, name=free, row={**run.row, "name": free}))
    return apart
