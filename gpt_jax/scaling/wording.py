"""Laws, predictions and their scores in lines for people, and laws as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpt_jax.scaling.fitted import LEVEL, Fitted, check_law, fit_law, ladder_points
from gpt_jax.scaling.optima import fit_minima, isoflop_minima
from gpt_jax.scaling.points import Points, Row
from gpt_jax.scaling.prediction import Score


def fit(
    rows: Sequence[Row], names: Sequence[str], params: str, min_tokens: int = 0
) -> tuple[list[str], dict[str, Any]]:
    """Fits laws of the table to a ledger.

    Returns:
      Lines for people, and the laws as JSON. A law for which the runs are too few is told with the
      reason.

    Raises:
      ValueError: An unknown law, or none that can be fitted.
    """
    for name in names:
        check_law(name)
    points = ladder_points(rows, params, min_tokens=min_tokens)
    lines = [f"{len(points)} runs, N is {params}", *excluded_lines(points.excluded)]
    laws, refused = [], []
    for name in names:
        try:
            laws.append(law_values(fit_law(name, points)))
            lines += law_lines(laws[-1])
        except ValueError as error:
            refused.append({"law": name, "reason": str(error)})
            lines.append(f"no {name}: {_reason(error)}")
    if not laws:
        raise ValueError(refused[0]["reason"] if refused else "law: '' names none")
    excluded = [{"name": name, "reason": reason} for name, reason in points.excluded]
    values = {"params": params, "level": LEVEL, "laws": laws, "refused": refused}
    values |= {"used": list(points.names), "excluded": excluded}
    return [*lines, *minima_lines(points)], values


def law_values(fitted: Fitted) -> dict[str, Any]:
    """A law as JSON: constants with intervals of LEVEL."""
    found = fitted.found
    names = [field.name for field in dataclasses.fields(found.law)]
    intervals = {
        name: tuple(map(float, found.spread(lambda law, name=name: getattr(law, name), LEVEL)))
        for name in names
    }
    values = {
        "law": fitted.name,
        "form": found.law.form,
        "constants": dataclasses.asdict(found.law),
        "intervals": intervals,
        "noise": found.noise,
        "draws": len(found.laws),
        "seed": found.seed,
    }
    if hasattr(found.law, "params_exponent"):
        low, high = found.spread(lambda law: law.params_exponent, LEVEL)
        values["params_exponent"] = [found.law.params_exponent, float(low), float(high)]
    return values


def law_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """What law_values has, in lines."""
    yield f"{values['form']}   ({values['law']})"
    for name, value in values["constants"].items():
        low, high = values["intervals"][name]
        yield f"  {name:6} {_digits(value):>10}   {LEVEL:.0%} in {_digits(low)} .. {_digits(high)}"
    if "params_exponent" in values:
        value, low, high = values["params_exponent"]
        yield f"  best N ~ C^{value:.3f}   {LEVEL:.0%} in {low:.3f} .. {high:.3f}"
    yield f"  single runs lie {values['noise']:.2%} around it (standard deviation)"


def minima_lines(points: Points) -> Iterator[str]:
    """Chinchilla's second approach: the best size of each budget, and how it grows."""
    minima = isoflop_minima(points)
    yield "isoFLOP minima"
    for one in minima:
        what = one.reason or f"N {one.num_params:.3g}, D {one.num_tokens:.3g}, loss {one.loss:.4f}"
        yield f"  {one.flops:.3g} FLOPs: {what}"
    try:
        size, tokens = fit_minima(minima)
    except ValueError as error:
        yield f"  no law of the best size: {_reason(error)}"
        return
    yield f"  best N ~ C^{size.p:.3f}, best D ~ C^{tokens.p:.3f}"


def excluded_lines(excluded: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Who is left out, and why."""
    for name, reason in excluded:
        yield f"left out: {name}: {reason}"


def prediction_lines(prediction: Mapping[str, Any]) -> Iterator[str]:
    """What a prediction file says."""
    run = prediction["run"]
    largest = max(row["flops"] for row in prediction["used"])
    yield (
        f"run:    {run['num_params']:,} parameters, {run['num_tokens']:,} tokens, "
        f"{run['flops']:.3g} FLOPs: {run['flops'] / largest:.3g} times the largest of "
        f"{len(prediction['used'])} runs"
    )
    yield from excluded_lines((row["name"], row["reason"]) for row in prediction["excluded"])
    for one in prediction["predictions"]:
        yield (
            f"{one['measure']}: {one['value']:.4f}   {prediction['level']:.0%} in "
            f"{one['low']:.4f} .. {one['high']:.4f}   by {one['form']}"
        )
        if one.get("left_out"):
            yield f"  without {', '.join(one['left_out'])}: no logarithm of the measure"
    for one in prediction["refused"]:
        yield f"no prediction by {one['law']}: {_reason(one['reason'])}"
    if prediction["made_after_the_run"]:
        yield "NOTE: the run has begun; the prediction is marked as made after it"


def score_lines(score: Score) -> Iterator[str]:
    """Predicted and actual values, and whether it was a prediction."""
    yield f"run:        {score.run}"
    if score.objections:
        for objection in score.objections:
            yield f"prediction: NOT made before this run: {objection}"
    else:
        yield f"prediction: made before the run, sha256 {score.sha256}"
    for one in score.comparisons:
        told = f"predicted {one.predicted:.4f} ({one.low:.4f} .. {one.high:.4f})"
        if one.actual is None:
            yield f"{one.measure}: {told}, not measured; gpt-jax evaluate does   by {one.form}"
            continue
        error = f"{one.error:+.2%}" if one.error is not None else "-"
        where = "inside" if one.is_inside else "OUTSIDE"
        yield f"{one.measure}: {told}, actual {one.actual:.4f}: {error}, {where}   by {one.form}"


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Writes JSON for `--out`."""
    pathlib.Path(path).write_text(json.dumps(values, indent=2) + "\n")


def _digits(value: float) -> str:
    return f"{value:.4g}"


def _reason(error: Any) -> str:
    return str(error).removeprefix("ledger: ")
