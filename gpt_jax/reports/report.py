"""One page about several runs: what differed, how they went, what laws they follow."""

from etils import epath

from gpt_jax.reports import laws_section, predictions_section
from gpt_jax.reports.curves import loss_curves
from gpt_jax.reports.figures import Figure, colors, draw_png
from gpt_jax.reports.ledger_section import ledger_section, provenance_section
from gpt_jax.reports.page import (
    figure_html,
    page,
    paragraph,
    picker,
    require_plotly,
    section,
    text,
)
from gpt_jax.reports.report_runs import ReportRun, is_finite, read_runs
from gpt_jax.reports.tables import differences, scientific


def write_report(
    places: list[str],
    out: epath.PathLike,
    title: str = "",
    png: epath.PathLike | None = None,
    min_tokens: int = 0,
) -> list[epath.Path]:
    """Writes the page, and the figures as PNG if a folder for them is given.

    Args:
      places: Run directories, folders of runs, ledgers.
      out: The HTML to write; what was there is replaced.
      title: Of the page; "": made of the places' names.
      png: A folder, made if it is not there.
      min_tokens: Runs that saw fewer are in no fit.

    Returns:
      What was written, the page first.

    Raises:
      ValueError: No runs at a place, or plotly is not installed.
    """
    require_plotly()
    out = epath.Path(out)
    if out.is_dir():
        raise ValueError(f"--out: {str(out)!r} is a folder; name a file, such as report.html")
    runs = read_runs(places)
    title = title or "Runs of " + ", ".join(epath.Path(place).name or place for place in places)
    markup, figures = report(runs, title, min_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written whole or not at all.
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(markup)
    partial.replace(out)
    written = [out]
    if png is not None:
        folder = epath.Path(png)
        folder.mkdir(parents=True, exist_ok=True)
        written += [draw_png(figure, folder) for figure in figures]
    return written


def report(runs: list[ReportRun], title: str, min_tokens: int = 0) -> tuple[str, list[Figure]]:
    """The page's HTML and the figures in it.

    Args:
      runs: At least one.
      title: Text.
      min_tokens: As of write_report.
    """
    runs = sorted(runs, key=lambda run: (_cost(run), run.name))
    palette = dict(zip((run.name for run in runs), colors(len(runs)), strict=True))
    curves = loss_curves(runs, palette)
    laws = laws_section.laws_section([run.row for run in runs], palette, min_tokens)
    scored = predictions_section.predictions_section(runs, palette)
    fitted = bool(laws.figures)
    sections = [
        f"<h1>{text(title)}</h1>",
        paragraph(_summary(runs), soft=True),
        picker([run.name for run in runs], palette),
    ]
    configs = {run.name: run.config for run in runs}
    if any(configs.values()):
        what = "What differs between them" if len(runs) > 1 else "Config"
        sections.append(section(what, differences(configs, palette, "fields of the config")))
    if len(runs) > 1:
        table = ledger_section(runs, palette, laws.excluded, fitted)
        sections += [
            section("Runs", table, paragraph(laws.refusal, soft=True) if laws.refusal else ""),
        ]
    sections += [
        section("Loss curves", *map(figure_html, curves)),
        section("Laws", laws.markup),
        section("Predictions", scored.markup),
        section("Where the figures come from", provenance_section(runs, palette)),
    ]
    figures = [*curves, *laws.figures, *scored.figures]
    return page(title, "\n".join(part for part in sections if part), figures), figures


def _cost(run: ReportRun) -> float:
    """FLOPs so far, those after the newest checkpoint too."""
    flops = run.row.get("flops")
    seen = max((x for x, _ in run.train), default=0.0) * (run.flops_per_token or 0.0)
    return max(flops if is_finite(flops) else 0.0, seen)


def _summary(runs: list[ReportRun]) -> str:
    rows = [run.row for run in runs]
    states = [row.get("status") or "of unknown status" for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    words = f"{len(runs)} runs: {counts}." if len(runs) > 1 else f"One run, {counts[2:]}."
    for key, what in (("num_params", "parameters"), ("num_tokens", "tokens"), ("flops", "FLOPs")):
        values = [row[key] for row in rows if is_finite(row.get(key)) and row[key]]
        if values:
            low, high = scientific(min(values)), scientific(max(values))
            words += f" {low} {what}." if low == high else f" {low} to {high} {what}."
    losses = [row["loss"] for row in rows if is_finite(row.get("loss"))]
    if losses:
        words += f" {'Lowest loss' if len(runs) > 1 else 'Loss'} {min(losses):.4f} nats a token."
    return words
