"""prediction.json: what a run will reach, written down before it begins.  Starts no JAX.

`predicting.py` makes one. It is written once; the run that begins beside it keeps its sha256 in
receipt.json, and `score` compares the two, and what was predicted with what came.
"""

import dataclasses
import hashlib
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from etils import epath

from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.identity import first_difference
from gpt_jax.runs.ledger import FINISHED, ledger_row

FILE = "prediction.json"
SHA_KEY = "prediction_sha256"  # of receipt.json
# As in runs/run.py, which starts JAX.
_CONFIG, _RECEIPT, _LOCK = "config.json", "receipt.json", ".lock"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One predicted number beside the one that came.

    Attributes:
      measure: "loss", or the name of an evaluation.
      law: Its name in scaling.fitted, or "measure".
      form: Its formula.
      predicted, low, high: The prediction and its interval.
      actual: What came; None: the run was not evaluated so.
    """

    measure: str
    law: str
    form: str
    predicted: float
    low: float
    high: float
    actual: float | None

    @property
    def error(self) -> float | None:
        """(predicted - actual) / |actual|."""
        if not self.actual:
            return None
        return (self.predicted - self.actual) / abs(self.actual)

    @property
    def is_inside(self) -> bool | None:
        """Whether the interval contains what came."""
        return None if self.actual is None else self.low <= self.actual <= self.high


@dataclasses.dataclass(frozen=True)
class Score:
    """A run's prediction, judged.

    Attributes:
      run: Its name.
      sha256: Of the prediction as it lies there.
      objections: Why it is no prediction made before the run; (): it is one.
      comparisons: The first is of the law that is believed most.
    """

    run: str
    sha256: str
    objections: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


def has_begun(workdir: epath.PathLike) -> bool:
    """Whether a run has been started in the directory."""
    return any((epath.Path(workdir) / name).exists() for name in (_CONFIG, _RECEIPT, _LOCK))


def check_unwritten(workdir: epath.PathLike) -> None:
    """Raises a ValueError where there is a prediction already: none is ever replaced."""
    if (epath.Path(workdir) / FILE).exists():
        raise ValueError(
            f"--workdir: {str(workdir)!r} has a {FILE} already, and a prediction is never replaced"
        )


def write_prediction(workdir: epath.PathLike, prediction: Mapping[str, Any]) -> str:
    """Writes the file and returns its sha256.

    Raises:
      ValueError: There is a prediction already: none is ever replaced.
    """
    path = pathlib.Path(workdir) / FILE
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"--workdir: {str(workdir)!r} is a file")
    check_unwritten(workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(prediction, indent=2, allow_nan=False) + "\n"
    with open(path, "x") as file:
        file.write(text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_prediction(workdir: epath.PathLike) -> tuple[dict[str, Any], str] | None:
    """(prediction, sha256 of its file); None: there is none.

    Raises:
      ValueError: The file is damaged.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        prediction = json.loads(content)
        prediction["config"], prediction["predictions"]  # what all its readers need
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"--workdir: {str(path)!r} is damaged: it is no prediction") from None
    return prediction, hashlib.sha256(content).hexdigest()


def check_prediction(workdir: epath.PathLike, config: RunConfig) -> str | None:
    """For a run that begins: the sha256 of its prediction; None: there is none.

    Both configs are resolved: fields with defaults, a model that is inherited.

    Raises:
      ValueError: It is of another run; names the first field that differs, with both values.
    """
    found = read_prediction(workdir)
    if found is None:
        return None
    different = _difference(found[0], config)
    if different:
        name, predicted, ours = different
        raise ValueError(
            f"{name}: {ours!r} in the config, but {FILE} in {str(workdir)!r} is of a run with "
            f"{predicted!r}; train that run, or give another --workdir"
        )
    return found[1]


def kept_prediction(workdir: epath.PathLike, config: RunConfig) -> str | None:
    """For a run that is continued: the sha256 that it began with, from its receipt.

    Warns where the file is another now, or predicts another run than this has become.
    """
    began_with = _receipt(epath.Path(workdir)).get(SHA_KEY)
    found = read_prediction(workdir)
    for objection in _objections(found, began_with, config) if found or began_with else ():
        warnings.warn(f"{FILE} in {str(workdir)!r}: {objection}", stacklevel=2)
    return began_with


def score(workdir: epath.PathLike) -> Score:
    """Compares a finished run with its prediction.

    Raises:
      ValueError: There is no run, it is not finished, or has no prediction.
    """
    workdir = epath.Path(workdir)
    row = ledger_row(workdir)
    found = read_prediction(workdir)
    began_with = _receipt(workdir).get(SHA_KEY)
    if found is None:
        gone = f"; the run began with one of sha256 {began_with}" if began_with else ""
        raise ValueError(f"--run: {str(workdir)!r} has no {FILE}{gone}")
    if row["status"] != FINISHED:
        raise ValueError(
            f"--run: {str(workdir)!r} is {row['status']}: its prediction is of the whole run"
        )
    prediction, sha256 = found
    config = run_config(json.loads((workdir / _CONFIG).read_text()))
    actual = {"loss": row["loss"], **row["evaluations"]}
    comparisons = [
        Comparison(
            measure=one["measure"],
            law=one["law"],
            form=one["form"],
            predicted=one["value"],
            low=one["low"],
            high=one["high"],
            actual=actual.get(one["measure"]),
        )
        for one in prediction["predictions"]
    ]
    objections = _objections(found, began_with, config)
    return Score(row["name"], sha256, tuple(objections), tuple(comparisons))


def _objections(
    found: tuple[dict[str, Any], str] | None, began_with: str | None, config: RunConfig
) -> list[str]:
    """What speaks against a prediction as one that was made before the run, of this run."""
    if found is None:
        return [f"it is gone; the run began with one of sha256 {began_with}"]
    prediction, sha256 = found
    objections = []
    if prediction.get("made_after_the_run"):
        objections.append("it was made after the run had begun")
    elif began_with is None:
        objections.append("the run began without it")
    if began_with not in (None, sha256):
        objections.append(f"it is {sha256}, but the run began with {began_with}")
    if different := _difference(prediction, config):
        name, predicted, ours = different
        objections.append(f"it is of a run with {name} {predicted!r}, but this one has {ours!r}")
    return objections


def _difference(prediction: Mapping[str, Any], config: RunConfig) -> tuple[str, Any, Any] | None:
    try:
        predicted = run_config(prediction["config"])
    except ValueError as error:
        raise ValueError(f"{FILE}: its config is not one of a run: {error}") from None
    return first_difference(predicted, config)


def _receipt(workdir: epath.Path) -> dict[str, Any]:
    path = workdir / _RECEIPT
    return json.loads(path.read_text()) if path.exists() else {}
