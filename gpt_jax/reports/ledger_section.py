"""The runs' figures as a table, and where they come from."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.reports.page import folded, paragraph
from gpt_jax.reports.report_runs import ReportRun
from gpt_jax.reports.tables import Cell, differences, scientific, short, table
from gpt_jax.runs.config import flatten
from gpt_jax.scaling.counts import FLOPS_RULE

# Key of a ledger's row -> title and what hovering over it says.
_COLUMNS = {
    "group": ("group", "as the sweep calls it"),
    "num_params": ("parameters", "all of them"),
    "num_params_non_embedding": ("without embeddings", "parameters but for the embeddings"),
    "num_tokens": ("tokens", "trained on, repeats included"),
    "epochs": ("epochs", "how often the data were seen"),
    "flops": ("FLOPs", "of training: FLOPs a token times tokens"),
    "loss": ("loss", "on the whole validation split at the end, nats a token"),
    "best_loss": ("best loss", "the lowest of the run, nats a token"),
    "bits_per_byte": ("bits/byte", "on the validation split, of text"),
    "learning_rate": ("learning rate", "at its highest"),
    "seed": ("seed", ""),
    "seconds": ("seconds", "of training"),
    "tokens_per_sec": ("tokens/s", ""),
}
_SETTINGS = ("group", "learning_rate", "seed")
_STATUS = {"finished": "good", "unfinished": "warn", "failed": "bad", "diverged": "bad"}


def ledger_section(
    runs: list[ReportRun], colors: Mapping[str, str], excluded: Mapping[str, str], fitted: bool
) -> str:
    """The table of runs, columns that none has left out.

    Args:
      runs: One line each.
      colors: By run's name.
      excluded: {name: why it is not in the fits}.
      fitted: Whether there are fits.
    """
    rows = [run.row for run in runs]
    keys = [key for key in _COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    if all(row.get("best_loss") == row.get("loss") for row in rows):
        keys = [key for key in keys if key != "best_loss"]
    # What all share is among the config's fields already.
    same = [key for key in _SETTINGS if len({str(row.get(key)) for row in rows}) == 1]
    keys = [key for key in keys if key not in same]
    scores = sorted({name for row in rows for name in _scores(row)})
    titles = ["run", "status", *(["in the fits"] if fitted else [])]
    titles += [_COLUMNS[key][0] for key in keys] + scores
    lines = []
    for run in runs:
        row = run.row
        line = [Cell(run.name, swatch=colors[run.name]), _status(row.get("status"))]
        if fitted:
            reason = excluded.get(run.name)
            line.append(Cell("yes") if reason is None else Cell(reason, f"no: {reason}", "warn"))
        line += [_cell(key, row.get(key)) for key in keys]
        lines.append([*line, *(_scores(row).get(name) for name in scores)])
    notes = {title: note for title, note in _COLUMNS.values() if note}
    shown = table(titles, lines, runs=[run.name for run in runs], notes=notes)
    rule = paragraph(FLOPS_RULE[0].upper() + FLOPS_RULE[1:] + ".", soft=True)
    return shown + folded("What FLOPs count", rule)


def _status(status: str | None) -> Cell:
    return Cell(status, tag=_STATUS.get(status or "", ""))


def _cell(key: str, value: Any) -> Cell:
    if not isinstance(value, int | float):
        return Cell(value)
    if key == "flops":
        return Cell(value, scientific(value))
    if key in ("loss", "best_loss", "bits_per_byte"):
        return Cell(value, f"{value:.4f}")
    if key in ("learning_rate", "seed"):
        return Cell(value, f"{value:g}")
    return Cell(value)


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return flatten(row.get("evaluations") or {})


def provenance_section(runs: list[ReportRun], colors: Mapping[str, str]) -> str:
    """Commit, versions, devices and data of each run: what differs, then what all share."""
    found = {run.name: _provenance(run) for run in runs}
    if not any(found.values()):
        return ""
    commands = [
        [Cell(run.name, swatch=colors[run.name]), _command(run)] for run in runs if _command(run)
    ]
    written = table(["run", "command"], commands, runs=[str(line[0].value) for line in commands])
    return differences(found, colors, "facts of receipts", is_open=len(runs) == 1) + folded(
        "Commands", written if commands else ""
    )


def _provenance(run: ReportRun) -> dict[str, Any]:
    """Facts of a run's receipt, or of a ledger's row."""
    row, receipt = run.row, run.receipt
    facts: dict[str, Any] = {
        "data": row.get("data"),
        "data fingerprint": row.get("data_fingerprint"),
        "config sha256": row.get("config_sha"),
        "commit": row.get("git_commit"),
    }
    if row.get("prediction_sha256"):
        facts["prediction sha256"] = row["prediction_sha256"]
    sessions = receipt.get("sessions") or []
    for session in sessions[-1:]:  # the one that ended the run
        facts["commit"] = session.get("git_commit")
        facts["changes beside the commit"] = "yes" if session.get("git_diff") else "none"
        facts["started"] = sessions[0].get("started")
        facts["starts"] = len(sessions)
        facts["python"] = session.get("python")
        facts["devices"] = _devices(session.get("devices") or [])
        facts["processes"] = session.get("processes")
        facts["mesh"] = ", ".join(f"{k} {v}" for k, v in (session.get("mesh") or {}).items())
    for session in sessions:  # the last verdict counts
        if session.get("reproduced"):
            facts["run again"] = _verdict(session["reproduced"])
    if receipt:
        tokenizer = receipt.get("data", {}).get("tokenizer") or {}
        facts["tokenizer"] = tokenizer.get("kind")
        facts["tokenizer fingerprint"] = tokenizer.get("fingerprint")
    versions = sessions[-1].get("packages") if sessions else row.get("versions")
    facts |= {f"{name} (version)": version for name, version in (versions or {}).items()}
    return {
        name: value if isinstance(value, str | int) else short(value)
        for name, value in facts.items()
        if value not in (None, "", [], {})
    }


def _verdict(found: Mapping[str, Any]) -> str:
    """What `gpt-jax reproduce` found of a run."""
    if found["equal"]:
        return f"equal, bit for bit, up to step {found['steps']}"
    return f"different: {found['row'] or found['leaf']}"


def _command(run: ReportRun) -> str:
    """Of the last start; the program by its name, whatever its path."""
    sessions = run.receipt.get("sessions") or [{}]
    return " ".join(["gpt-jax", *(sessions[-1].get("command") or [])[1:]]) * bool(run.receipt)


def _devices(devices: list[str]) -> str:
    kinds = list(dict.fromkeys(devices))
    return ", ".join(f"{devices.count(kind)} x {kind}" for kind in kinds)
