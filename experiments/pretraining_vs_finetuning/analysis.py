"""From the ledgers of this study to its tables, laws and figures.

  python experiments/pretraining_vs_finetuning/analysis.py [--ledger=transfer.jsonl] [--out=FOLDER]

N is num_params_non_embedding; data are counted in bytes of text, which are characters but for a
few; the loss of a run is the best of its evaluations. Prints Markdown, writes results.json and
PNGs.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from gpt_jax.reports.figures import Figure, Series, colors, draw_png
from gpt_jax.runs.ledger import read_ledger
from gpt_jax.scaling import published, transfer
from gpt_jax.scaling.finetuning import fit_joint, fit_unified, leave_one_size_out
from gpt_jax.scaling.points import Points, points_of
from gpt_jax.scaling.transfer import Effective, bootstrap_transfer, effective_data, fit_transfer

HERE = pathlib.Path(__file__).parent
DRAWS = 400
# Up to here of D_F / D_E a cell is a point of the fit. The source takes 0.10, where no cell of this
# study lies; 1 takes all in which pretraining helped.
LOW_DATA = (0.10, 1.0)


def points(rows: list[dict[str, Any]], kind: str) -> Points:
    """The runs whose name begins with `kind`; the amount of data is what the config gave."""
    rows = [row for row in rows if row["name"].startswith(f"{kind}-")]
    found = points_of(rows, params="num_params_non_embedding", loss="best_loss")
    given = {row["name"]: row["overrides"]["data.train_tokens"] for row in rows}
    return dataclasses.replace(found, unique_tokens=[given[name] for name in found.names])


def pretraining(rows: list[dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """{N: row} of the runs of English."""
    found = [row for row in rows if row["name"].startswith("english-")]
    return {float(row["num_params_non_embedding"]): row for row in found}


def curve(scratch: Points, size: float, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, loss) of the runs from scratch of a size, seeds averaged; x is "data" or "flops"."""
    of_size = scratch.num_params == size
    found = []
    for amount in np.unique(scratch.unique_tokens[of_size]):
        cell = of_size & (scratch.unique_tokens == amount)
        x = amount if key == "data" else scratch.flops[cell].mean()
        found.append((x, scratch.loss[cell].mean()))
    x, loss = map(np.array, zip(*sorted(found), strict=True))
    return x, loss


def at(x: np.ndarray, loss: np.ndarray, wanted: float) -> tuple[float, str]:
    """The loss at `wanted` between the runs, in logarithms; beyond the last one its loss, and "<".

    Before the first run nothing is known: (nan, "").
    """
    if wanted > x[-1]:
        return float(loss.min()), "<"
    if wanted < x[0]:
        return math.nan, ""
    return float(np.exp(np.interp(np.log(wanted), np.log(x), np.log(loss)))), ""


def spread(runs: Points, size: float, amount: float) -> float:
    """Half the distance between the seeds of a cell; nan with one seed."""
    loss = runs.loss[(runs.num_params == size) & (runs.unique_tokens == amount)]
    return float(np.ptp(loss) / 2) if len(loss) > 1 else math.nan


def matched(
    scratch: Points, finetuned: Points, english: dict[float, dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each cell the finetuned loss, and that of a model of the same size from scratch with

    same_data: the same Python; same_tokens: as much Python as pretraining and finetuning read
    different text together; same_flops: as much Python as it likes, for the FLOPs of finetuning
    alone, or (all_flops) of pretraining too. "<": below the value, which is the longest run's.
    """
    found = []
    for size, (amounts, losses) in transfer.cells(finetuned).items():
        data, flops = curve(scratch, size, "data"), curve(scratch, size, "flops")
        before = english[size]
        for amount, loss in zip(amounts, losses, strict=True):
            cell = (finetuned.num_params == size) & (finetuned.unique_tokens == amount)
            spent = float(finetuned.flops[cell].mean())
            found.append({
                "num_params": size, "finetune_tokens": float(amount), "finetuned": float(loss),
                "half_range": spread(finetuned, size, amount),
                "scratch_half_range": spread(scratch, size, amount),
                "same_data": at(*data, amount),
                "same_tokens": at(*data, amount + before["num_tokens"]),
                "same_flops": at(*flops, spent),
                "all_flops": at(*flops, spent + before["flops"]),
            })  # fmt: skip
    return found


def law(scratch: Points, finetuned: Points, low_data: float) -> dict[str, Any]:
    """D_T = k D_F^alpha N^beta with 90 % intervals, or why it cannot be told."""
    cells = effective_data(scratch, finetuned, low_data)
    used = [cell for cell in cells if not cell.reason]
    try:
        fitted = fit_transfer(cells)
        drawn = bootstrap_transfer(scratch, finetuned, DRAWS, low_data=low_data)
    except ValueError as error:
        return {"low_data": low_data, "cells": len(used), "refused": str(error)}
    intervals = {
        name: np.quantile([getattr(other, name) for other in drawn], [0.05, 0.95]).tolist()
        for name in ("k", "alpha", "beta")
    }

    def predict(fit: np.ndarray, rest: np.ndarray) -> np.ndarray:
        one_out = fit_transfer([used[i] for i in fit])
        return np.array(
            [one_out.predict(used[i].finetune_tokens, used[i].num_params) for i in rest]
        )

    errors = leave_one_size_out(
        np.array([c.num_params for c in used]), np.array([c.transferred for c in used]), predict
    )
    return {
        "low_data": low_data, "cells": len(used), **dataclasses.asdict(fitted),
        "intervals": intervals, "left_out": errors,
    }  # fmt: skip


def losses_laws(scratch: Points, finetuned: Points) -> dict[str, Any]:
    """Two laws of a finetuned model's loss, and how they do on a size that they have not seen."""
    size, data, loss = finetuned.num_params, finetuned.unique_tokens, finetuned.loss

    def joint(fit: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return fit_joint(size[fit], data[fit], loss[fit]).predict(size[rest], data[rest])

    def unified(fit: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return fit_unified(scratch, finetuned.take(fit)).predict(size[rest], data[rest])

    of_both = {
        "joint": (joint, lambda: fit_joint(size, data, loss)),
        "unified": (unified, lambda: fit_unified(scratch, finetuned)),
    }
    found = {}
    for name, (predict, fit) in of_both.items():
        try:
            fitted = fit()
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        residuals = np.abs(fitted.predict(size, data) / loss - 1)
        found[name] = {
            "law": fitted.form, **dataclasses.asdict(fitted), "error": float(residuals.mean()),
            "left_out": leave_one_size_out(size, loss, predict),
        }  # fmt: skip
    return found


def labelled(path: pathlib.Path) -> list[dict[str, Any]]:
    """Accuracy by number of labels: the mean and the range of the seeds."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in read_ledger(path) if path.exists() else ():
        scores = {key: x for key, x in row["evaluations"].items() if key.endswith("/accuracy")}
        if row["status"] == "finished" and scores:
            cell = found.setdefault(row["overrides"]["tasks.limit"], {})
            cell.setdefault(row["group"], []).append(next(iter(scores.values())))
    return [{"labels": number, **cell} for number, cell in sorted(found.items())]


def short(number: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def print_tables(result: dict[str, Any], cells: list[Effective]) -> None:
    print("\n| N | D_F | scratch | finetuned | gain | D_E | D_T | D_E / D_F | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell, row in zip(cells, result["matched"], strict=True):
        scratch = row["same_data"][0]
        known = not math.isnan(cell.effective_tokens)
        numbers = (cell.effective_tokens, cell.transferred) if known else ()
        words = [f"{short(x) if x >= 0 else '-' + short(-x)}" for x in numbers] or ["", ""]
        times = f"{cell.multiplier:.1f}" if known else ""
        print(f"| {short(cell.num_params)} | {short(cell.finetune_tokens)} | {scratch:.3f} "
              f"| {cell.loss:.3f} | {scratch - cell.loss:+.3f} | {words[0]} | {words[1]} "
              f"| {times} | {cell.reason} |")  # fmt: skip
    print("\n| N | D_F | finetuned | scratch: same Python | as many tokens of Python "
          "| FLOPs of finetuning | FLOPs of both |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for row in result["matched"]:
        shown = [
            f"{below}{loss:.3f}" if not math.isnan(loss) else ""
            for loss, below in (
                row[key] for key in ("same_data", "same_tokens", "same_flops", "all_flops")
            )
        ]
        print(f"| {short(row['num_params'])} | {short(row['finetune_tokens'])} "
              f"| {row['finetuned']:.3f} | " + " | ".join(shown) + " |")  # fmt: skip
    print("\n| D_T = k D_F^alpha N^beta | k | alpha | beta | cells |\n|---|---|---|---|---|")
    for row in result["transfer"]:
        name = f"measured, D_F / D_E up to {row['low_data']:g}"
        if "refused" in row:
            reason = row["refused"].partition(";")[0]  # without the list of cells
            print(f"| {name} | {reason} | | | {row['cells']} |")
            continue
        shown = [
            f"{row[x]:.3g} ({row['intervals'][x][0]:.2g} to {row['intervals'][x][1]:.2g})"
            for x in ("k", "alpha", "beta")
        ]
        print(f"| {name} | " + " | ".join(shown) + f" | {row['cells']} |")
    for row in result["published"]:
        print(
            f"| {row['name']} ({row['mark']}) | {row['k']:.3g} | {row['alpha']} | {row['beta']} | |"
        )
    for name, row in result["losses"].items():
        if "refused" in row:
            print(f"\n{name}: {row['refused']}")
            continue
        left = ", ".join(f"{short(size)} {error:.1%}" for size, error in row["left_out"].items())
        print(
            f"\n{name}: {row['law']}: off by {row['error']:.1%} on the runs; "
            f"by size left out: {left}"
        )
    if result["labelled"]:
        print("\n| labels | scratch | finetuned |\n|---|---|---|")
        for row in result["labelled"]:
            shown = [
                ", ".join(f"{x:.3f}" for x in row.get(k, ())) for k in ("scratch", "finetuned")
            ]
            print(f"| {row['labels']:,} | {shown[0]} | {shown[1]} |")


def figures(scratch: Points, finetuned: Points, cells: list[Effective]) -> list[Figure]:
    """Loss by data, and the multiplier by data, a colour a size."""
    sizes = sorted(transfer.cells(finetuned))
    losses, times = [], []
    for size, color in zip(sizes, colors(len(sizes)), strict=True):
        for words, runs, style in (
            ("scratch", scratch, "both"),
            ("finetuned", finetuned, "dashed"),
        ):
            amounts, means = transfer.cells(runs)[size]
            name = f"{short(size)}, {words}"
            losses.append(Series(name, tuple(amounts), tuple(means), color, style))
        known = [c for c in cells if c.num_params == size and not math.isnan(c.multiplier)]
        x, y = [c.finetune_tokens for c in known], [c.multiplier for c in known]
        times.append(Series(short(size), tuple(x), tuple(y), color, "both"))
    label = "characters of Python"
    ends = (min(finetuned.unique_tokens), max(finetuned.unique_tokens))
    times.append(Series("pretraining is worth nothing", ends, (1.0, 1.0), "#555555", "dashed"))
    return [
        Figure("loss_by_data", "Python from scratch, and after English", "", label,
               "validation loss (nats a character)", tuple(losses), x_log=True),
        Figure("multiplier", "How many times as much Python a model from scratch needs", "", label,
               "D_E / D_F", tuple(times), x_log=True, y_log=True),
    ]  # fmt: skip


def analyse(ledger: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """All of it; what results.json holds."""
    rows = list(read_ledger(ledger))
    scratch, finetuned = points(rows, "scratch"), points(rows, "finetuned")
    cells = effective_data(scratch, finetuned)
    laws = [law(scratch, finetuned, low) for low in LOW_DATA]
    measured = next((x for x in reversed(laws) if "k" in x), None)
    known = published.transfer_table(
        transfer.TransferLaw(*(measured[x] for x in ("k", "alpha", "beta")))
        if measured else transfer.TransferLaw(math.nan, math.nan, math.nan)
    )  # fmt: skip
    result = {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "matched": matched(scratch, finetuned, pretraining(rows)),
        "transfer": laws,
        "published": [row for row in known if row["name"] != "measured"],
        "losses": losses_laws(scratch, finetuned),
        "labelled": labelled(ledger.with_name("labelled.jsonl")),
        "excluded": [*scratch.excluded, *finetuned.excluded],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(_finite(result), indent=1) + "\n")
    for figure in figures(scratch, finetuned, cells):
        draw_png(figure, out)
    print_tables(result, cells)
    return result


def _finite(value: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ledger", type=pathlib.Path, default=HERE / "transfer.jsonl")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "figures")
    args = parser.parse_args()
    analyse(args.ledger, args.out)
