"""metrics.jsonl, the record of a run: one flat JSON row an event; and copies of it for viewers."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from gpt_jax.runs.line_file import LineFile

# Not a result of the run: two runs with equal results differ in these alone.
VOLATILE = ("time", "perf/")


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line that was cut off is left out."""
    return list(_whole_rows(epath.Path(path).read_bytes()))


def _whole_rows(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            return


class MetricsLog:
    """Appends rows; on resuming, rows after the checkpoint are cut off first.

    Args:
      path: The run's metrics.jsonl.
      resume_step: The step the run goes on from; None: the file starts anew.
    """

    def __init__(self, path: epath.PathLike, resume_step: int | None):
        self._path = os.fspath(path)
        rows = []
        if resume_step is not None and os.path.exists(self._path):
            rows = [row for row in read_rows(self._path) if row["step"] <= resume_step]
        # A copy that replaces the file: being killed here leaves the old rows or the new ones.
        partial = f"{self._path}.partial"
        with open(partial, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(partial, self._path)
        self._file = LineFile(self._path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds a row; values that are not finite are written as strings, as JSON has no NaN."""
        row = {"step": step, **{name: _jsonable(value) for name, value in values.items()}}
        self._file.write(json.dumps({**row, "time": round(time.time(), 3)}))

    def sync(self) -> None:
        """Returns when all rows are on disk; OSError where there is no room for them."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class NoLog:
    """In the place of a log where another process writes it."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        del step, values

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _jsonable(value: Any) -> Any:
    if isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _summary_writer() -> type:
    """tensorboardX's; it would import torch, if there is one, for a type that is never written.

    That took four seconds before the first step.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter  # slow to import
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class TensorBoard:
    """TensorBoard events, written without TensorFlow."""

    def __init__(self, directory: epath.PathLike, resume_step: int | None):
        # Events after the checkpoint are hidden, as their rows are cut off.
        purge = None if resume_step is None else resume_step + 1
        self._writer = _summary_writer()(os.fspath(directory), purge_step=purge)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def require_wandb(project: str) -> None:
    """Raises ValueError if wandb, which the config asks for, is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb: {project!r} asks for Weights & Biases, which is not installed; "
            "pip install wandb"
        )


class WeightsAndBiases:
    """A Weights & Biases run that goes on when the run does."""

    def __init__(self, project: str, identity: str, config: dict[str, Any]):
        import wandb

        # The same id when the run is continued, so that it stays one curve.
        self._run = wandb.init(project=project, id=identity, resume="allow", config=config)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
