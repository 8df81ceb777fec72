"""A run's loss curve as a PNG."""

import os
from typing import Any

from etils import epath


def draw_loss_curve(rows: list[dict[str, Any]], path: epath.PathLike, title: str) -> None:
    """Draws training and validation loss (nats a token) against tokens seen.

    Args:
      rows: Rows of a metrics.jsonl.
      path: The PNG to write.
      title: Written above.
    """
    from matplotlib.figure import Figure

    train = [(row["train/tokens"], row["train/loss"]) for row in rows if "train/loss" in row]
    held_out = [
        (row["eval/tokens"], row["eval/validation/loss"])
        for row in rows
        if "eval/validation/loss" in row
    ]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for points, label, style in ((train, "training", "-"), (held_out, "validation", "o-")):
        points = [(x, y) for x, y in points if not isinstance(y, str)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    # Written whole or not at all, like everything in a run.
    partial = f"{os.fspath(path)}.partial"
    figure.savefig(partial, format="png")
    os.replace(partial, path)
