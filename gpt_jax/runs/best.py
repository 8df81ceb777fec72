"""Which evaluations were the best and when to stop: pure functions over rows of metrics.jsonl.

Nothing is remembered but the rows, so a run that is killed and continued keeps the same
checkpoints and stops at the same step. A metric is named without its `eval/`: "validation/loss".
"""

import math
from collections.abc import Iterable
from typing import Any

# Which way is better, by the last part of a metric's name.
_MODES = {
    **dict.fromkeys(("loss", "perplexity", "bits_per_byte", "mse", "mae", "rmse"), "min"),
    **dict.fromkeys(("accuracy", "f1", "macro_f1", "micro_f1", "entity_f1", "matthews"), "max"),
    **dict.fromkeys(("bleu", "chrf", "exact_match", "pearson", "spearman", "parse_rate"), "max"),
}


def metric_mode(metric: str, mode: str = "") -> str:
    """ "min" or "max": what is given, else what the name of the metric says.

    Raises:
      ValueError: Neither says it.
    """
    if mode not in ("", "min", "max"):
        raise ValueError(f"train.metric_mode: {mode!r} is not one of min, max, '' (by the name)")
    found = mode or _MODES.get(metric.rsplit("/", 1)[-1])
    if found is None:
        raise ValueError(
            f"train.metric_mode: '' does not say whether {metric!r} is better low or high; set it "
            "to min or max"
        )
    return found


def best_steps(rows: Iterable[dict[str, Any]], metric: str, mode: str, k: int) -> list[int]:
    """The steps of the k best evaluations, best first.

    What is not finite never counts as best; of equal ones the earliest is.
    """
    sign = {"min": 1, "max": -1}[mode]
    values = [(step, value) for step, value in _evaluations(rows, metric) if math.isfinite(value)]
    return [step for step, _ in sorted(values, key=lambda pair: (sign * pair[1], pair[0]))[:k]]


def should_stop(rows: Iterable[dict[str, Any]], metric: str, mode: str, patience: int) -> bool:
    """Whether the last `patience` evaluations (0: never) brought nothing better than before."""
    rows = list(rows)
    steps = [step for step, _ in _evaluations(rows, metric)]
    best = best_steps(rows, metric, mode, 1)
    since = len([step for step in steps if not best or step > best[0]])
    return bool(patience) and since >= patience


def _evaluations(rows: Iterable[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that hold the metric; what was not finite is text there."""
    name = f"eval/{metric}"
    return [(row["step"], float(row[name])) for row in rows if name in row]
