"""Laws, predictions and their scores in lines for people, and laws as JSON."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gpt_jax.scaling.fitted import LEVEL, Fitted
from gpt_jax.scaling.optima import fit_minima, isoflop_minima
from gpt_jax.scaling.points import Points
from gpt_jax.scaling.prediction import Score


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
        yield f"  no law of the best size: {reason_of(error)}"
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
        yield f"no prediction by {one['law']}: {reason_of(one['reason'])}"
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


def _digits(value: float) -> str:
    return f"{value:.4g}"


def reason_of(error: Any) -> str:
    """A refusal without the field that it begins with."""
    return str(error).removeprefix("ledger: ")
