"""What is known here of a launch: one JSON file in runs/launches.  Starts no JAX."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from gpt_jax.launch.target import Target

FOLDER = pathlib.Path("runs") / "launches"


@dataclasses.dataclass
class Record:
    """A launch, as far as it has come.

    Attributes:
      target: Where to.
      workdir: As it was given.
      job: Id of the job.
      code: The commit in words.
      command: What the hosts run, as lines.
      state: In words, as of the last look.
      active: Seconds since the epoch, [from, to] of each time that the slices were there; the last
        `to` grows while they are.
      starts: How often the job was started.
      preemptions: How often the slices were taken away.
      log_offset: Bytes of the first host's log that were seen.
      row: The last row of metrics that was seen.
      code_of_end: Exit code of `up`; None: it has not ended.
    """

    target: Target
    workdir: str
    job: str = ""
    code: str = ""
    command: list[str] = dataclasses.field(default_factory=list)
    state: str = "new"
    active: list[list[float]] = dataclasses.field(default_factory=list)
    starts: int = 0
    preemptions: int = 0
    log_offset: int = 0
    row: dict[str, Any] | None = None
    code_of_end: int | None = None

    def begin_active(self, now: float) -> None:
        """The slices are there from now on."""
        self.active.append([now, now])

    def still_active(self, now: float) -> None:
        """The slices are still there."""
        if self.active:
            self.active[-1][1] = now

    @property
    def chip_hours(self) -> float:
        """Of all times that the slices were there, as far as they were looked at."""
        seconds = sum(end - begin for begin, end in self.active)
        return seconds / 3600 * self.target.num_chips

    @property
    def cost(self) -> float | None:
        """What they have cost; None: no price was given."""
        price = self.target.price
        return None if price is None else price * self.chip_hours

    def save(self, folder: pathlib.Path) -> None:
        """Replaces the file as a whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = _path(folder, self.target.name)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        partial.replace(path)


def load(folder: pathlib.Path, name: str) -> Record | None:
    """The record of a launch; None: there is none of that name."""
    try:
        values = json.loads(_path(folder, name).read_text())
    except FileNotFoundError:
        return None
    # Secrets were looked up when they were sent; a later command needs none of them.
    return Record(**{**values, "target": Target(**{**values["target"], "secrets": ()})})


@contextlib.contextmanager
def held(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Keeps a second `up` of the same name out.

    Raises:
      ValueError: There is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--name: another `launch up` is at {name!r}") from None
        yield


def log_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """What `up` has printed of the hosts' log."""
    return folder / f"{name}.log"


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.json"
