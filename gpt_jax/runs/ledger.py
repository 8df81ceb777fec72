"""The ledger: one JSON row a run, made of what the run directories hold.  Starts no JAX.

docs/sweeps.md tells what each key means.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from gpt_jax.runs.best import metric_mode, should_stop
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.identity import config_sha
from gpt_jax.runs.metrics import read_rows

FINISHED, UNFINISHED, FAILED, DIVERGED = "finished", "unfinished", "failed", "diverged"
# As in runs/run.py, which starts JAX.
_CONFIG, _RECEIPT, _METRICS, _EVALUATIONS, _CHECKPOINTS = (
    "config.json", "receipt.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints",
)  # fmt: skip
_NOT_FINITE = ("nan", "inf", "-inf")
_OF_EVALUATIONS = ("step", "task", "split", "num_shots")  # what an evaluation's row is of


def ledger_row(
    workdir: epath.PathLike,
    *,
    group: str = "",
    overrides: Mapping[str, Any] | None = None,
    failed: bool = False,
) -> dict[str, Any]:
    """What a run directory says of its run.

    A run that was cut off has rows behind its newest checkpoint; they are not counted, since a
    continuation writes them anew. A diverged run has all of its rows.

    Args:
      workdir: A run directory; the run may be under way, or have ended in any way.
      group: The sweep's label of the run.
      overrides: What the sweep changed in the config.
      failed: Whether its command ended with an error; counts where the run is not finished.

    Returns:
      The row; numbers that are not known are None, those that are not finite are floats too.

    Raises:
      ValueError: There is no run, or one of its files is damaged.
    """
    workdir = epath.Path(workdir)
    config = run_config(_read_json(workdir / _CONFIG))
    receipt = _read_json(workdir / _RECEIPT) if (workdir / _RECEIPT).exists() else {}
    rows = _rows(workdir / _METRICS)
    saved = _newest_checkpoint(workdir)
    status = _status(config, receipt, rows, saved)
    if status != DIVERGED:
        rows = [row for row in rows if row["step"] <= saved]
    if status == UNFINISHED and failed:
        status = FAILED
    step = rows[-1]["step"] if status == DIVERGED else saved
    tokens_per_step = config.train.batch_size * config.data.seq_len
    session = (receipt.get("sessions") or [{}])[-1]
    data = receipt.get("data", {})
    num_params = receipt.get("num_parameters")
    rates = [row["perf/tokens_per_sec"] for row in rows if "perf/tokens_per_sec" in row]
    return {
        "name": workdir.name,
        "group": group,
        "status": status,
        "num_params": num_params,
        "num_params_non_embedding": num_params and num_params - _embeddings(config.model),
        "num_tokens": step * tokens_per_step,
        "epochs": _epochs(data, step * config.train.batch_size),
        "flops": receipt["flops_per_token"] * step * tokens_per_step if receipt else None,
        **_losses(config, rows, status),
        "seed": config.seed,
        "learning_rate": config.optimizer.learning_rate,
        "seconds": _seconds(rows, tokens_per_step),
        "tokens_per_sec": statistics.median(rates) if rates else None,
        "config_sha": config_sha(config),
        "data": data.get("name", config.data.path or config.data.name),
        "data_fingerprint": data.get("fingerprint"),
        "git_commit": session.get("git_commit"),
        "versions": session.get("packages", {}),
        "prediction_sha256": _prediction(receipt),
        "evaluations": _evaluations(workdir / _EVALUATIONS),
        "overrides": dict(overrides or {}),
    }


def run_steps(workdir: epath.PathLike) -> tuple[int, int]:
    """(steps that have a row or a checkpoint, steps of the whole run; 0: not known yet)."""
    workdir = epath.Path(workdir)
    path = workdir / _RECEIPT
    total = _read_json(path)["steps"] if path.exists() else 0
    rows = _rows(workdir / _METRICS)
    return max(rows[-1]["step"] if rows else 0, _newest_checkpoint(workdir)), total


def last_loss(workdir: epath.PathLike) -> float | None:
    """The newest training loss of a run; None: it has no row yet."""
    rows = [row for row in _rows(epath.Path(workdir) / _METRICS) if "train/loss" in row]
    return float(rows[-1]["train/loss"]) if rows else None


def read_ledger(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a ledger, sorted by name; "nan", "inf" and "-inf" become floats again.

    Raises:
      ValueError: A line that is not a row, or two rows of one name.
      FileNotFoundError: There is no such file.
    """
    rows = {}
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            name = row["name"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"--ledger: line {number} of {str(path)!r} is not a row of a ledger"
            ) from None
        if name in rows:
            raise ValueError(f"--ledger: {str(path)!r} has two rows named {name!r}")
        rows[name] = {key: x if key in _TEXTS else _read_number(x) for key, x in row.items()}
    return [rows[name] for name in sorted(rows)]


def write_ledger(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a ledger as a whole, sorted by name: a reader never sees half of it."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(_jsonable(row), allow_nan=False) for row in sorted(rows, key=lambda r: r["name"])
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)


# Keys of a row whose values are texts, whatever they look like.
_TEXTS = ("name", "group", "status", "data", "overrides", "versions")


def _read_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_read_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _read_number(item) for key, item in value.items()}
    return float(value) if value in _NOT_FINITE else value


def _jsonable(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes text, as in metrics.jsonl."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"--run: {str(path.parent)!r} holds no run (no {path.name})") from None
    except ValueError:
        raise ValueError(f"--run: {str(path)!r} is damaged: it is not JSON") from None


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def _newest_checkpoint(workdir: epath.Path) -> int:
    """The newest step that is saved whole; 0: none."""
    folder = workdir / _CHECKPOINTS
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _status(config: RunConfig, receipt: dict[str, Any], rows: list[dict], saved: int) -> str:
    if saved and saved == receipt.get("steps"):
        return FINISHED
    if "first_nonfinite" in (receipt.get("sessions") or [{}])[-1]:  # the run halted for it
        return DIVERGED
    if config.train.on_nonfinite == "halt" and any(
        str(row.get(f"train/{x}")) in _NOT_FINITE for row in rows for x in ("loss", "grad_norm")
    ):
        return DIVERGED
    train = config.train
    if saved and train.patience:
        kept = [row for row in rows if row["step"] <= saved]
        mode = metric_mode(train.metric, train.metric_mode)
        if should_stop(kept, train.metric, mode, train.patience):
            return FINISHED
    return UNFINISHED


def _losses(config: RunConfig, rows: list[dict], status: str) -> dict[str, Any]:
    """loss, bits_per_byte, best_loss, curve: of the held-out split that the run goes by."""
    split = "validation"
    if config.tasks.names:
        by_metric = config.train.metric.rpartition("/")[0]
        split = by_metric if by_metric in config.tasks.names else config.tasks.names[0]
    name = f"eval/{split}/loss"
    evaluations = [row for row in rows if name in row]
    losses = [float(row[name]) for row in evaluations]
    # The last evaluation takes the whole split, unless the best is looked for: then values of
    # fewer rows do not compare with it.
    train = config.train
    same_rows = train.keep_best or train.patience or not train.eval_batches or status != FINISHED
    comparable = losses if same_rows else losses[-1:]
    bits = evaluations[-1].get(f"eval/{split}/bits_per_byte") if evaluations else None
    return {
        "loss": losses[-1] if losses else None,
        "bits_per_byte": None if bits is None else float(bits),
        "best_loss": min(filter(math.isfinite, comparable), default=None),
        "curve": [
            [row["eval/tokens"], loss] for row, loss in zip(evaluations, losses, strict=True)
        ],
    }


def _epochs(data: dict[str, Any], num_rows: int) -> float | None:
    rows = data.get("train", {}).get("rows")
    return num_rows / rows if rows else None


def _seconds(rows: list[dict], tokens_per_step: int) -> float:
    """Time of the steps that the rows are of, compilation included."""
    seconds, done = 0.0, 0
    for row in rows:
        if "train/loss" not in row:
            continue
        steps, done = row["step"] - done, row["step"]
        if "perf/first_steps_seconds" in row:
            seconds += row["perf/first_steps_seconds"]
        elif rate := row.get("perf/tokens_per_sec"):
            seconds += steps * tokens_per_step / rate
    return round(seconds, 3)


def _embeddings(model: Any) -> int:
    """Parameters of embeddings of tokens, positions and types, as scaling.counts groups them."""
    stacks = 2 if model.family == "encoder_decoder" and model.num_encoder_layers else 1
    positions = {
        "learned": model.seq_len * model.embed_dim,
        "relative": model.relative_buckets * model.num_heads,
    }
    tables = model.vocab_size + model.num_token_types
    return tables * model.embed_dim + stacks * positions.get(model.positions, 0)


def _prediction(receipt: dict[str, Any]) -> str | None:
    places = [receipt, *receipt.get("sessions", ())]
    return next((x["prediction_sha256"] for x in places if x.get("prediction_sha256")), None)


def _evaluations(path: epath.Path) -> dict[str, float]:
    """The last value of each figure: "task/split/figure", with "/K_shot" where there were shots."""
    found = {}
    for row in _whole_lines(path):
        shots = row.get("num_shots", 0)
        words = [row.get("task"), row.get("split"), f"{shots}_shot" if shots else None]
        for figure, value in row.items():
            value = float(value) if value in _NOT_FINITE else value
            if figure in _OF_EVALUATIONS or not _is_number(value):
                continue
            found["/".join([*filter(None, words), figure])] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that processes append to: a line that was cut off hides none behind it."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
