"""From a ledger and a config that is not yet trained to a prediction.  Starts no JAX."""

import dataclasses
import datetime
import hashlib
import math
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.identity import config_sha
from gpt_jax.runs.ledger import read_ledger
from gpt_jax.scaling import counts
from gpt_jax.scaling.fitted import (
    BOTH_FORMS,
    LEVEL,
    finite_interval,
    fit_law,
    fit_measure,
    ladder_points,
)
from gpt_jax.scaling.points import COUNTS, Points

_FORMAT = 1
_MEASURE_FORM = {"logprob": "-value = k C^p", "share": "-log(value) = k C^p"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A run that is to be predicted, in the numbers of a ledger's row."""

    num_params: int
    num_params_non_embedding: int
    num_tokens: int
    flops: float


def target_of(config: RunConfig) -> Target:
    """Size, tokens and FLOPs of a config's whole run, by arithmetic alone.

    Raises:
      ValueError: How long it is, only its data tell.
    """
    groups = counts.parameter_counts(config.model)
    total = sum(groups.values())
    duration = Duration.parse("train.duration", config.train.duration)
    length = config.data.seq_len
    rows = -(-config.data.train_tokens // length)
    if duration.unit == "epochs" and not rows:
        raise ValueError(
            f"train.duration: {config.train.duration!r} is a length that only the data tell; give "
            "steps, tokens or data.train_tokens"
        )
    tokens_per_step = config.train.batch_size * length
    num_tokens = duration.steps(Clock(tokens_per_step, rows * length)) * tokens_per_step
    return Target(
        num_params=total,
        num_params_non_embedding=total - groups["token embedding"] - groups["position embedding"],
        num_tokens=num_tokens,
        flops=counts.flops_per_token(config.model, length) * num_tokens,
    )


def make_prediction(
    config: RunConfig,
    ledger: epath.PathLike,
    *,
    params: str = "num_params",
    measures: Sequence[str] = (),
    min_tokens: int = 0,
    seed: int = 0,
    made_after_the_run: bool = False,
) -> dict[str, Any]:
    """What a run will reach, by the runs of a ledger.

    The loss by L(N, D) and by L(C); each measure by a power of the compute. A form for which the
    runs are too few is kept under "refused" with the reason.

    Args:
      config: The run's, resolved.
      ledger: The file.
      params: Which count is N: see points_of.
      measures: Names of evaluations of the ledger's rows: means of log-probabilities (not above 0)
        or shares.
      min_tokens: See ladder_points.
      seed: Of the draws of the intervals.
      made_after_the_run: Whether the run has begun. A run of this config in the ledger counts too.

    Returns:
      JSON values, as prediction.json holds them.

    Raises:
      ValueError: No form can be fitted; a measure that the runs do not have.
    """
    if params not in COUNTS:
        raise ValueError(f"params: {params!r} is not one of {', '.join(COUNTS)}")
    rows, sha = read_ledger(ledger), config_sha(config)
    known = {row["name"]: "is this run" for row in rows if row.get("config_sha") == sha}
    points, target = ladder_points(rows, params, known, min_tokens), target_of(config)
    place = {"num_params": getattr(target, params), "num_tokens": target.num_tokens}
    place["flops"] = target.flops
    predictions, refused = [], []
    for name in BOTH_FORMS:
        try:
            predictions.append(_of_loss(name, points, place, seed))
        except ValueError as error:
            refused.append({"law": name, "reason": str(error)})
    if not predictions:
        raise ValueError(refused[0]["reason"])
    predictions += [_of_measure(name, rows, points, target.flops, seed) for name in measures]
    return {
        "format": _FORMAT,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "made_after_the_run": made_after_the_run or bool(known),
        "git_commit": _git_commit(),
        "config_sha": sha,
        "run": dataclasses.asdict(target),
        "params": params,
        "min_tokens": min_tokens,
        "level": LEVEL,
        "predictions": predictions,
        "refused": refused,
        "ledger": {
            "name": epath.Path(ledger).name,
            "sha256": hashlib.sha256(epath.Path(ledger).read_bytes()).hexdigest(),
        },
        "used": [
            {"name": name, params: size, "num_tokens": tokens, "flops": flops, "loss": loss}
            for name, size, tokens, flops, loss in zip(
                points.names, points.num_params.tolist(), points.num_tokens.tolist(),
                points.flops.tolist(), points.loss.tolist(), strict=True,
            )
        ],
        "excluded": [{"name": name, "reason": reason} for name, reason in points.excluded],
        "config": config.to_dict(),
    }  # fmt: skip


def _of_loss(name: str, points: Points, place: Mapping[str, float], seed: int) -> dict[str, Any]:
    fitted = fit_law(name, points, seed)
    loss, low, high = fitted.loss(**place)
    found = fitted.found
    return {
        "measure": "loss", "law": name, "form": found.law.form,
        "constants": dataclasses.asdict(found.law), "noise": found.noise,
        "draws": len(found.laws), "seed": seed, "value": loss, "low": low, "high": high,
    }  # fmt: skip


def _of_measure(
    name: str, rows: Sequence[Mapping[str, Any]], points: Points, flops: float, seed: int
) -> dict[str, Any]:
    """GPT-4's form for a measure of a task, by the runs that were evaluated so.

    Of these the ones without a logarithm are left out.
    """
    values = {row["name"]: (row.get("evaluations") or {}).get(name) for row in rows}
    if all(values[run] is None for run in points.names):
        seen = sorted({key for row in rows for key in row.get("evaluations") or {}})
        has = f"they have {', '.join(seen)}" if seen else "they have none"
        raise ValueError(f"measures: {name!r} is no evaluation of the ledger's runs; {has}")
    measured = {run: values[run] for run in points.names if values[run] is not None}
    own = measured.values()
    kind = "logprob" if min(own) < 0 or max(own) <= 0 else "share"
    y = {run: _exponent(kind, value) for run, value in measured.items()}
    kept = [number for number, run in enumerate(points.names) if y.get(run) is not None]
    found = fit_measure(points.take(kept), y, seed=seed)
    ends = finite_interval(found, lambda law: law.predict(flops))
    value, high, low = ((-x if kind == "logprob" else math.exp(-x)) for x in ends)
    return {
        "measure": name, "law": "measure", "form": _MEASURE_FORM[kind],
        "constants": dataclasses.asdict(found.law), "noise": found.noise,
        "draws": len(found.laws), "seed": seed, "value": value, "low": low, "high": high,
        "values": measured,
        "left_out": [run for run in measured if y[run] is None],
    }  # fmt: skip


def _exponent(kind: str, value: float) -> float | None:
    """-value or -log(value), above 0; None where it is not."""
    if not math.isfinite(value) or (kind == "share" and not 0 < value < 1):
        return None
    y = -value if kind == "logprob" else -math.log(value)
    return y if y > 0 else None


def _git_commit() -> str | None:
    folder = epath.Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
