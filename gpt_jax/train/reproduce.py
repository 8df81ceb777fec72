"""Runs a run again, and says whether it is the same: bit for bit, or where it first differs."""

import contextlib
import dataclasses
import json
import signal
from typing import Any

from etils import epath

from gpt_jax.data import hashing
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoint_reader import CheckpointReader
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.identity import of_the_numbers
from gpt_jax.runs.metrics import VOLATILE, read_rows
from gpt_jax.runs.receipt import add_to_session
from gpt_jax.runs.run import read_config
from gpt_jax.train.loop import fit
from gpt_jax.train.setup import Training, set_up
from gpt_jax.train.workdir import lock_workdir

# What a start of the command says of itself that may change its numbers.
_SESSION = ("git_commit", "git_diff", "python", "packages", "devices", "processes", "mesh")


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What came of running a run again.

    Attributes:
      steps: How far it was run.
      num_rows: Rows that were compared.
      compared_steps: Checkpoints that both have, and whose leaves were compared.
      row: Where rows first differ, in words; "": nowhere.
      leaf: Where leaves first differ; "": nowhere.
      differences: In what the two were made by, in words: what may explain it.
    """

    steps: int
    num_rows: int
    compared_steps: tuple[int, ...]
    row: str
    leaf: str
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.row and not self.leaf

    def to_dict(self) -> dict[str, Any]:
        """For a receipt: JSON values."""
        return {"equal": self.equal, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """The verdict, then what may explain it."""
        at = ", ".join(map(str, self.compared_steps)) or "none that both have"
        compared = f"{self.num_rows} rows up to step {self.steps}; checkpoints: {at}"
        if self.equal:
            lines = [f"equal: bit for bit in {compared}"]
        else:
            found = [f"first row: {self.row}"] * bool(self.row)
            found += [f"first leaf: {self.leaf}"] * bool(self.leaf)
            lines = [f"different: compared {compared}", *found]
        what = "also differs" if self.equal else "may explain it"
        lines += [f"{what}: {difference}" for difference in self.differences]
        if not self.equal and not self.differences:
            lines.append("nothing that a receipt holds explains it: the machines may differ")
        return lines


def reproduce(
    run: epath.PathLike,
    workdir: epath.PathLike,
    cache_dir: epath.PathLike,
    steps: int | None = None,
    devices: list | None = None,
) -> Reproduction:
    """Trains by a run's config.json in a new folder, and compares.

    The verdict is also added to the last session of the run's receipt, as "reproduced", unless the
    folder is not ours to write or somebody trains in it.

    Args:
      run: The run directory.
      workdir: A folder that is not there yet.
      cache_dir: Where prepared data is kept.
      steps: How far; None: as far as the run went.
      devices: What to run on; None: all devices.

    Raises:
      ValueError: There is no run, or nothing of it to compare, or the new folder is there.
    """
    run, workdir = epath.Path(run), epath.Path(workdir)
    config = read_config(run)
    rows = _settled(run)
    if workdir.exists():
        raise ValueError(f"--workdir: {str(workdir)!r} is there already; give a new folder")
    if not rows:
        raise ValueError(f"--run: {str(run)!r} has no rows to compare with")
    done = max(row["step"] for row in rows)
    if steps is not None and not 1 <= steps <= done:
        raise ValueError(f"--steps: {steps} is not in 1 to {done}, as far as the run went")
    steps = done if steps is None else steps
    # It is not logged as a run of its own; nothing of this changes a number.
    quiet = dataclasses.replace(config.train, wandb="", tensorboard=False, profile="")
    training = set_up(dataclasses.replace(config, train=quiet), workdir, cache_dir, devices)
    if steps < training.total:
        _stop_after(training, steps)
    fit(training)

    rows = [row for row in rows if row["step"] <= steps]
    ours, theirs = _manifests(run), _manifests(workdir)
    both = tuple(sorted(set(ours) & set(theirs)))
    result = Reproduction(
        steps=steps,
        num_rows=len(rows),
        compared_steps=both,
        row=first_row(rows, _settled(workdir)),
        leaf=next(filter(None, (first_leaf(step, ours[step], theirs[step]) for step in both)), ""),
        differences=(
            *_config_differences(config, ours),
            *receipt_differences(_receipt(run), _receipt(workdir)),
        ),
    )
    with contextlib.suppress(OSError, ValueError), lock_workdir(run):
        add_to_session(run / layout.RECEIPT, {"reproduced": result.to_dict()})
    return result


def first_row(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Where two runs' rows first differ, in words."""
    for row, other in zip(rows, others, strict=False):
        for name in sorted(row.keys() | other.keys(), key=lambda name: (name != "step", name)):
            if row.get(name) != other.get(name):
                step = min(row["step"], other["step"])
                return f"step {step}, {name}: {row.get(name)} was {other.get(name)} again"
    if len(rows) != len(others):
        return f"there are {len(rows)} rows, and {len(others)} again"
    return ""


def first_leaf(step: int, manifest: dict[str, Any], other: dict[str, Any]) -> str:
    """Which leaf of two checkpoints of a step differs first, by name."""
    leaves, others = manifest["leaves"], other["leaves"]
    # Parameters before what follows from them.
    for name in sorted(
        leaves.keys() | others.keys(), key=lambda name: ("params" not in name, name)
    ):
        if leaves.get(name) != others.get(name):
            return f"step {step}, {name}"
    return ""


def receipt_differences(receipt: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In what two receipts differ of what may change numbers; every start counts."""
    new = _facts(other["sessions"][-1])
    found = [
        f"{name}: {_short(old)} was {_short(now)} again"
        for name, old, now in (
            ("data", receipt["data"]["fingerprint"], other["data"]["fingerprint"]),
            ("parameters", receipt["num_parameters"], other["num_parameters"]),
        )
        if old != now
    ]
    for session in receipt["sessions"]:
        facts, since = _facts(session), session["start_step"]
        for name in sorted(facts.keys() | new.keys()):
            if facts.get(name) != new.get(name):
                told = f"{name}: {_short(facts.get(name))} was {_short(new.get(name))} again"
                found.append(told + (f" (from step {since} on)" if since else ""))
    return list(dict.fromkeys(found))


def _facts(session: dict[str, Any]) -> dict[str, Any]:
    facts = {name: session.get(name) for name in _SESSION}
    devices = facts["devices"] or []
    kinds = [f"{devices.count(kind)} x {kind}" for kind in sorted(set(devices))]
    facts["devices"] = ", ".join(kinds) or None
    packages = facts.pop("packages") or {}
    diff = facts.pop("git_diff")
    facts["changes to the code that are not committed"] = hashing.digest(diff) if diff else None
    return facts | {f"packages.{name}": version for name, version in packages.items()}


def _config_differences(config: RunConfig, manifests: dict[int, dict[str, Any]]) -> list[str]:
    """Whether config.json is still what the checkpoints were made with."""
    now = of_the_numbers(config)
    for step, manifest in sorted(manifests.items(), reverse=True):
        before = of_the_numbers(run_config(manifest["config"]))
        found = [
            f"config: {name} was {before[name]!r} at step {step}, config.json has {value!r}"
            for name, value in now.items()
            # Where the text lies is nothing; what it holds has a fingerprint.
            if before[name] != value and name not in ("data.path", "data.validation_path")
        ]
        if found:
            return found
    return []


def _stop_after(training: Training, steps: int) -> None:
    """As if somebody asked the run to save and stop while it takes that step."""
    step = training.step

    def watched(state, *arguments):
        if int(state.step) + 1 == steps:  # not by counting: a rewind takes steps again
            signal.raise_signal(signal.SIGTERM)  # the loop's handler notes it
        return step(state, *arguments)

    training.step = watched


def _settled(workdir: epath.Path) -> list[dict[str, Any]]:
    path = workdir / layout.METRICS
    rows = read_rows(path) if path.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def _manifests(workdir: epath.Path) -> dict[int, dict[str, Any]]:
    """By step, of the checkpoints."""
    if not (workdir / layout.CHECKPOINTS).exists():
        return {}
    reader = CheckpointReader(workdir / layout.CHECKPOINTS)
    try:
        return {step: reader.manifest(step) for step in reader.steps()}
    finally:
        reader.close()


def _receipt(workdir: epath.Path) -> dict[str, Any]:
    return json.loads((workdir / layout.RECEIPT).read_text())


def _short(value: Any, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."
