"""TPU slices by name, as devices to compile for: no TPU is needed, only the compiler (libtpu).

A name is that of Cloud TPU: "v5e-256", "v5p-128", "v4-512", "v6e-64", and "2xv6e-256" for two
slices joined by the data-centre network. v4 and v5p count TensorCores, two to a chip; v5e and v6e
count chips.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      kind: JAX's `device_kind`.
      cores: TensorCores that the name of a slice counts for a chip.
      dims: Dimensions of the torus.
      hbm: Bytes of memory of a chip.
      link: Bytes a second that a chip can send to its neighbours, all links together.
      options: What libtpu must be told beside the shape.
    """

    kind: str
    cores: int
    dims: int
    hbm: int
    link: float
    options: tuple[tuple[str, str], ...] = ()


# As Cloud TPU's documentation gives them for a chip, a page a version (cloud.google.com/tpu/docs).
CHIPS = {
    "v4": Chip("TPU v4", 2, 3, 32 * GIB, 300e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip("TPU v5 lite", 1, 2, 16 * GIB, 200e9),
    "v5p": Chip("TPU v5", 2, 3, 95 * GIB, 600e9),
    "v6e": Chip("TPU v6 lite", 1, 2, 32 * GIB, 448e9),
}
# Bytes a second of a chip between slices, a share of its host's network card.
DCN = 6.25e9
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several.

    Attributes:
      name: As it was given.
      chip: Its generation: a key of CHIPS.
      shape: Chips along each dimension of the torus.
      slices: How many are joined.
    """

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices


def parse_topology(name: str) -> Topology:
    """From "v5e-256" or "2xv6e-256".

    Raises:
      ValueError: No such generation, or no slice of that size.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(v\d\w?)-(\d+)", name)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"--topology: {name!r} is not a slice; write GENERATION-SIZE with a generation of "
            f"{', '.join(CHIPS)}, as v5e-16 or 2xv5e-256"
        )
    slices, chip, size = int(found[1] or 1), found[2], int(found[3])
    chips, rest = divmod(size, CHIPS[chip].cores)
    shape = _shape(chips, CHIPS[chip].dims)
    if rest or shape is None or not 4 <= chips <= _LARGEST[chip] // CHIPS[chip].cores or not slices:
        sizes = [s * CHIPS[chip].cores for s in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)]
        offered = ", ".join(str(s) for s in sizes if s <= _LARGEST[chip])
        raise ValueError(f"--topology: {name!r}: slices of {chip} have {offered}")
    return Topology(name, chip, shape, slices)


def larger(topology: Topology) -> Iterator[Topology]:
    """The larger slices of a topology's generation, as many of them joined, the smallest first."""
    chip, size = CHIPS[topology.chip], topology.num_chips // topology.slices
    while (size := 2 * size) * chip.cores <= _LARGEST[topology.chip]:
        joined = f"{topology.slices}x" if topology.slices > 1 else ""
        yield parse_topology(f"{joined}{topology.chip}-{size * chip.cores}")


def _shape(chips: int, dims: int) -> tuple[int, ...] | None:
    """The most cubic torus of powers of two; None: not a power of two."""
    power = chips.bit_length() - 1
    if chips != 1 << power:
        return None
    if dims == 2:
        return 1 << power // 2, 1 << (power + 1) // 2
    if power == 2:
        return 2, 2, 1
    return tuple(1 << (power + i) // 3 for i in range(3))


def devices(topology: Topology, cache_dir) -> list:
    """Devices of a slice for jax.sharding.Mesh: programs can be compiled for them, not run.

    Args:
      topology: The slice.
      cache_dir: Where libtpu is put when it is not there yet: 200 MiB are fetched from the package
        index. In a folder of its own it does not make JAX look for a TPU at other times.

    Raises:
      ValueError: libtpu cannot be had.
    """
    _prepare(Path(cache_dir))
    from jax.experimental import topologies

    chip = CHIPS[topology.chip]
    options = dict(chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    bounds = (2, 2, 1) if topology.num_chips > 4 or chip.dims == 3 else (*topology.shape, 1)
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.chip}:{'x'.join(map(str, topology.shape))}",
        chips_per_host_bounds=bounds,
        **options,
    ).devices


def _prepare(cache_dir: Path) -> None:
    """Points JAX to libtpu, and keeps libtpu from looking for the machine it would run on."""
    os.environ.setdefault("TPU_LIBRARY_PATH", str(_library(cache_dir)))
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # Without it a second process stops at the lock file of the first.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


def _library(cache_dir: Path) -> Path:
    """libtpu.so, of the version that the installed jax asks for in its extra `tpu`."""
    asked = (
        re.match(r"(libtpu\s*==\s*([\d.]+)\*?)", r) for r in importlib.metadata.requires("jax")
    )
    requirement, version = next((found[1], found[2]) for found in asked if found)
    folder = cache_dir / "libtpu" / version.rstrip(".")
    library = folder / "libtpu" / "libtpu.so"
    if not library.exists():
        print(f"fetching {requirement}, the TPU compiler, to {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        # It appears whole or not at all; whoever else fetches it meanwhile may be first.
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            done = subprocess.run([*command, partial, requirement], capture_output=True, text=True)
            with contextlib.suppress(OSError):
                os.replace(os.path.join(partial, "libtpu"), folder / "libtpu")
        if not library.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"--topology: {requirement} could not be fetched: {reason}")
    return library
