"""Where a launch goes: names that are checked, and what the cloud calls a slice.  Starts no JAX."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence

from gpt_jax.parallel.topologies import CHIPS, Topology, parse_topology

MOUNTS = "/mnt/gs"  # gs://BUCKET/x is MOUNTS/BUCKET/x on a host
_BUCKET = r"[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9]"
# As Compute Engine has them.
_NAME = r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?"
_PROJECT = r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"
_ZONE = r"[a-z]+-[a-z]+\d+-[a-z]"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the cloud calls a generation of TPU.

    Attributes:
      accelerator: Before the size, in --accelerator-type.
      runtime: The software of its hosts; cloud.google.com/tpu/docs/runtimes, JAX.
      gke: The label of its nodes in a GKE cluster.
    """

    accelerator: str
    runtime: str
    gke: str


GENERATIONS = {
    "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Slices that are asked for together, and how.

    Attributes:
      name: Of the launch and its queued resource.
      project: The cloud project.
      zone: In which the slices lie.
      topology: One slice by name, as "v5e-16".
      slices: How many, joined by the data-centre network.
      spot: May be taken away at any time, for less money.
      reserved: Out of a reservation of the project.
      secrets: Names of environment variables that the hosts get.
      price: Of a chip for an hour; None: costs are not told.
      max_cost: At which the run is stopped; None: no limit.
      max_wait: Hours in the queue; None: no limit.

    Raises:
      ValueError: A name that the cloud would refuse, or settings that exclude each other.
    """

    name: str
    project: str
    zone: str
    topology: str
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    secrets: tuple[str, ...] = ()
    price: float | None = None
    max_cost: float | None = None
    max_wait: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "secrets", tuple(self.secrets))
        check_name(self.name)
        _check("--project", self.project, _PROJECT, "the id of a cloud project, as my-project-1")
        _check("--zone", self.zone, _ZONE, "a zone, as us-west4-a")
        if self.shape.slices > 1:
            raise ValueError(f"--topology: {self.topology!r}: say how many slices by --slices")
        if self.slices < 1:
            raise ValueError(f"--slices: {self.slices} is not at least 1")
        if self.spot and self.reserved:
            raise ValueError("--spot: a reservation is not spot; leave out one of the two")
        check_secrets(self.secrets)
        for name, value in (("price", self.price), ("max_wait", self.max_wait)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name}: {value} is not above 0")
        if self.max_cost is not None and self.price is None:
            raise ValueError("--max_cost: give --price too, what a chip costs in an hour")
        if self.max_cost is not None and not self.max_cost > 0:
            raise ValueError(f"--max_cost: {self.max_cost} is not above 0")

    @property
    def shape(self) -> Topology:
        """The slice that the name stands for."""
        return parse_topology(self.topology)

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return self.shape.num_chips * self.slices

    @property
    def hosts_per_slice(self) -> int:
        """Machines of a slice."""
        return self.shape.num_chips // self.chips_per_host

    @property
    def chips_per_host(self) -> int:
        """Four, but that eight chips of v5e or v6e are one machine."""
        return 8 if CHIPS[self.shape.chip].dims == 2 and self.shape.num_chips == 8 else 4

    @property
    def num_hosts(self) -> int:
        """Of all slices."""
        return self.hosts_per_slice * self.slices

    @property
    def generation(self) -> Generation:
        """What the cloud calls it."""
        return GENERATIONS[self.shape.chip]

    @property
    def accelerator_type(self) -> str:
        """Of one slice, as "v5litepod-16"."""
        size = self.shape.num_chips * CHIPS[self.shape.chip].cores
        return f"{self.generation.accelerator}-{size}"


def check_name(name: str) -> None:
    """Raises ValueError where a name cannot be that of a launch."""
    _check("--name", name, _NAME, "up to 40 of a-z, 0-9 and -, beginning with a letter")


def check_secrets(names: Sequence[str]) -> None:
    """Raises ValueError where a secret is no variable that is set here."""
    for name in names:
        if not re.fullmatch(_VARIABLE, name):
            # What was given may be the secret itself: it is not shown.
            raise ValueError("--secret: give the name of an environment variable, as HF_TOKEN")
        if not os.environ.get(name):
            raise ValueError(f"--secret: {name} is not set in the environment")


def mounted(path: str, mounts: str = MOUNTS) -> str:
    """gs://BUCKET/x as a host sees it; any other text as it is.

    Raises:
      ValueError: It begins as a bucket, and is none.
    """
    if not path.startswith("gs://"):
        return path
    bucket = bucket_of(path)
    rest = path.removeprefix(f"gs://{bucket}").strip("/")
    if ".." in rest.split("/"):
        raise ValueError(f"--workdir: {path!r} leaves its bucket")
    return "/".join(filter(None, (mounts, bucket, rest)))


def bucket_of(path: str, field: str = "--workdir") -> str:
    """The bucket of gs://BUCKET/x.

    Args:
      path: The text.
      field: Where it was given.

    Raises:
      ValueError: There is none.
    """
    found = re.fullmatch(rf"gs://({_BUCKET})(/[^\n\0]*)?", path)
    if not found:
        raise ValueError(f"{field}: {path!r} is no place in a bucket, as gs://my-bucket/runs/a")
    return found[1]


def _check(option: str, value: str, pattern: str, right: str) -> None:
    if not re.fullmatch(pattern, value or ""):
        raise ValueError(f"{option}: {value!r} is not {right}")
