"""What the hosts of a launch run: a list of `gpt-jax train` commands.  Starts no JAX."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.convert.source import inherit_model
from gpt_jax.launch.sweeps import plan_sweep
from gpt_jax.launch.target import MOUNTS, bucket_of, mounted
from gpt_jax.runs.config import flatten, run_config
from gpt_jax.runs.config_file import load_config


@dataclasses.dataclass(frozen=True)
class JobRun:
    """One run of a job.

    Attributes:
      name: Of the run.
      workdir: Its directory, as a host sees it.
      arguments: For `gpt-jax train`.
    """

    name: str
    workdir: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """What every host runs, one run after another; with several hosts they run each together.

    Attributes:
      id: Of the code and the commands: a host that is at another job is known by it.
      commit: Of the code.
      sweep: The name of the sweep; "": one run.
      workdir: The run, or the folder of the sweep's runs, as a host sees it.
      buckets: That the hosts need.
      runs: In their order.
    """

    id: str
    commit: str
    sweep: str
    workdir: str
    buckets: tuple[str, ...]
    runs: tuple[JobRun, ...]

    def to_json(self) -> str:
        """For job.json, which launch.host reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def plan_job(
    spec: str,
    workdir: str,
    overrides: Sequence[str],
    *,
    root: pathlib.Path,
    commit: str,
    diff: bytes = b"",
    sweep: str = "",
    several_hosts: bool = False,
    mounts: str = MOUNTS,
) -> Job:
    """The job of a config, checked as `train` and `sweep` check it before they start JAX.

    Args:
      spec: "FILE[:args]" of --config; FILE lies in the repository.
      workdir: gs://BUCKET/..., or an absolute path that all hosts share.
      overrides: "a.b=value" each. A value of the config that begins with gs:// becomes the path
        that the hosts see.
      root: Of the repository.
      commit: Of the code that is shipped.
      diff: What of the code is not committed.
      sweep: FILE defines sweep_<name>(); "": one run.
      several_hosts: Whether the processes of several hosts form one program.
      mounts: Where hosts have their buckets.

    Raises:
      ValueError: As of load_config, run_config and plan_sweep; a file outside of the repository; a
        folder that hosts cannot share.
    """
    if not workdir.startswith(("gs://", "/")):
        raise ValueError(f"--workdir: {workdir!r} is neither gs://... nor an absolute path")
    place = mounted(workdir, mounts)
    shipped = _in_repository(spec, root)
    values, _ = load_config(spec, overrides)
    in_buckets = {
        field: value
        for field, value in flatten(values).items()
        if isinstance(value, str) and value.startswith("gs://")
    }
    changes = [text for text in overrides if text.partition("=")[0] not in in_buckets]
    for field, value in in_buckets.items():
        bucket_of(value, field)
        changes.append(f"{field}={mounted(value, mounts)}")
    if sweep:
        planned = plan_sweep(spec, sweep, pathlib.Path(place), changes)
        given = [(run.name, str(run.workdir), run.arguments[1:]) for run in planned]
    else:
        if "init.source" not in in_buckets:  # which cannot be read from here
            run_config(inherit_model(load_config(spec, changes)[0]))
        given = [(pathlib.PurePath(place).name, place, [f"--config.{x}" for x in changes])]
    together = ["--distributed=auto"] if several_hosts else []
    runs = tuple(
        JobRun(name, where, (f"--config={shipped}", f"--workdir={where}", *words, *together))
        for name, where, words in given
    )
    places = [x for x in (workdir, *in_buckets.values()) if x.startswith("gs://")]
    buckets = tuple(dict.fromkeys(map(bucket_of, places)))
    said = json.dumps([commit, [dataclasses.asdict(run) for run in runs]]).encode()
    identity = hashlib.sha256(said + diff).hexdigest()[:12]
    return Job(identity, commit, sweep, place, buckets, runs)


def read_job(folder: pathlib.Path) -> Job:
    """The job of a host's folder."""
    values: Mapping[str, Any] = json.loads((folder / "job.json").read_text())
    runs = tuple(JobRun(x["name"], x["workdir"], tuple(x["arguments"])) for x in values["runs"])
    return Job(**{**values, "buckets": tuple(values["buckets"]), "runs": runs})


def _in_repository(spec: str, root: pathlib.Path) -> str:
    """The spec with FILE from the root of the repository on, where the hosts find it."""
    path, colon, argument = spec.partition(":")
    file = pathlib.Path(path).resolve()
    if not file.is_relative_to(root.resolve()):
        raise ValueError(f"--config: {path!r} is not in the repository, so that it is not shipped")
    return f"{file.relative_to(root.resolve()).as_posix()}{colon}{argument}"
