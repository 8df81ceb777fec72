"""What a device can do at best: by its kind from data sheets, on CPU by a measurement.

`Peak` is for one device of JAX. That is a chip on TPU v4, v5 and v6, and one of a chip's two cores
on v2, v3 and 7x, whose figures are halved here.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Peak:
    """Rates of one device.

    Attributes:
      bfloat16, float32: FLOP/s of dense products in a compute dtype, a multiply-add being two.
      memory: Bytes a second from and to its memory.
    """

    bfloat16: float
    float32: float
    memory: float


def _tpu(bfloat16: float, memory: float, devices: int = 1) -> Peak:
    """A chip's figures to a device's; f32 at its highest precision is six passes in bf16."""
    return Peak(bfloat16 / devices, bfloat16 / 6 / devices, memory / devices)


# Whole names of device kinds, after "NVIDIA", "Tesla" and "GeForce". NVIDIA: data sheets and
# architecture papers (Volta to Blackwell); bf16 with f32 accumulation, without sparsity (sheets
# that only give the sparse rate: half of it); f32 is that of the plain units, as our f32 products
# ask for full precision and not for TF32. V100 and T4 have no bf16 units: f32 is their rate.
# TPU: cloud.google.com/tpu/docs, a page a version.
_PEAKS: dict[str, Peak] = {
    r"TPU v2": _tpu(45e12, 700e9, devices=2),
    r"TPU v3": _tpu(123e12, 900e9, devices=2),
    r"TPU v4": _tpu(275e12, 1228e9),
    r"TPU (v5 lite|v5e)": _tpu(197e12, 819e9),
    r"TPU (v5|v5p)": _tpu(459e12, 2765e9),
    r"TPU (v6 lite|v6e)": _tpu(918e12, 1640e9),
    r"TPU ?(v7x|7x)": _tpu(2307e12, 7380e9, devices=2),
    r"V100-(SXM2|SXM3).*": Peak(15.7e12, 15.7e12, 900e9),
    r"V100-PCIE-.*": Peak(14e12, 14e12, 900e9),
    r"T4": Peak(8.1e12, 8.1e12, 320e9),
    r"A100-(SXM4|PCIE)-40GB": Peak(312e12, 19.5e12, 1555e9),
    r"A100-SXM4-80GB": Peak(312e12, 19.5e12, 2039e9),
    r"A100 80GB PCIe": Peak(312e12, 19.5e12, 1935e9),
    r"A10": Peak(125e12, 31.2e12, 600e9),
    r"A10G": Peak(70e12, 31.5e12, 600e9),
    r"A30": Peak(165e12, 10.3e12, 933e9),
    r"A40": Peak(149.7e12, 37.4e12, 696e9),
    r"L4": Peak(121e12, 30.3e12, 300e9),
    r"L40": Peak(181e12, 90.5e12, 864e9),
    r"L40S": Peak(362e12, 91.6e12, 864e9),
    r"H100 80GB HBM3|H100 SXM5?.*": Peak(989e12, 66.9e12, 3350e9),
    r"H100 PCIe": Peak(756e12, 51.2e12, 2000e9),
    r"H100 NVL": Peak(835e12, 60e12, 3900e9),
    r"H200": Peak(989e12, 66.9e12, 4800e9),
    r"H200 NVL": Peak(835e12, 60e12, 4800e9),
    r"GH200 .*": Peak(989e12, 66.9e12, 4000e9),
    r"B200": Peak(2250e12, 75e12, 8000e9),
    r"GB200": Peak(2500e12, 80e12, 8000e9),
    r"RTX A5000": Peak(111e12, 27.8e12, 768e9),
    r"RTX A6000": Peak(154.8e12, 38.7e12, 768e9),
    r"RTX 6000 Ada Generation": Peak(364e12, 91.1e12, 960e9),
    r"RTX 3090": Peak(71e12, 35.6e12, 936e9),
    r"RTX 4090": Peak(165.2e12, 82.6e12, 1008e9),
    r"RTX 5090": Peak(209.5e12, 104.8e12, 1792e9),
}


def peak_of_kind(device_kind: str) -> Peak | None:
    """The table's entry for a `device_kind` of JAX; None where there is none.

    The whole name must match: slices of a card (MIG), laptop and other variants have other rates.
    """
    name = re.sub(r"^(NVIDIA )?(Tesla |GeForce )?", "", device_kind)
    found = [peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)]
    assert len(found) < 2, device_kind
    return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class Roof:
    """What all devices of a mesh can do together, and where that is from.

    Attributes:
      flops_per_second: In the compute dtype; None: not known.
      bytes_per_second: Of their memories; None: not known.
      source: In words.
    """

    flops_per_second: float | None
    bytes_per_second: float | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


NO_ROOF = Roof(None, None, "not looked at")


def roof_of(mesh: Mesh, dtype: str, cache_dir: epath.PathLike, num_hosts: int = 1) -> Roof:
    """The roof of a mesh for products in a compute dtype.

    On CPU a product is timed (`measured`), so nothing else should be computing; there the devices
    of a machine share it, and the number of them does not count.

    Args:
      mesh: The devices.
      dtype: "bfloat16" or "float32".
      cache_dir: Where the best that was measured is kept.
      num_hosts: Machines that the devices are on: on CPU each counts as this one.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        flops, size = measured(dtype)
        best = _best_kept(epath.Path(cache_dir) / "roof.json", _machine(dtype), flops)
        earlier = "" if best == flops else ", in an earlier process"
        return Roof(
            best * num_hosts,
            None,
            f"measured: a product of {size} x {size} in {dtype} that emits float32{earlier}",
        )
    peak = peak_of_kind(device.device_kind)
    if peak is None:
        return Roof(None, None, f"no peak is known of the device kind {device.device_kind!r}")
    return Roof(
        getattr(peak, dtype) * mesh.size,
        peak.memory * mesh.size,
        f"data sheet of {device.device_kind!r}, dense {dtype}, {mesh.size} devices",
    )


# A product must take so long that calling it does not count, and be large enough for all cores.
_SIZES, _LONG_ENOUGH, _PATIENCE = (1024, 2048, 4096), 0.004, 0.1


@functools.cache
def measured(dtype: str) -> tuple[float, int]:
    """(FLOP/s, its size) of the fastest square product on the CPU; measured once in a process."""

    @jax.jit
    def product(x, y):
        highest = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        return jnp.dot(x, y, precision=highest, preferred_element_type=jnp.float32)

    device = jax.local_devices(backend="cpu")[0]
    rates = {}
    for size in _SIZES:
        x = jax.device_put(np.full((size, size), 0.5, jnp.dtype(dtype)), device)
        product(x, x).block_until_ready()
        fastest, since = math.inf, time.perf_counter()
        while (start := time.perf_counter()) - since < _PATIENCE:
            product(x, x).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
        rates[2 * size**3 / fastest] = size
        if fastest > _LONG_ENOUGH:
            break
    return max(rates), rates[max(rates)]


def processor() -> str:
    """The processor's name; on Linux with family and model, for clouds call unlike ones alike."""
    told = {}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                told.setdefault(name.strip(), value.strip())
    name = told.get("model name") or platform.processor()
    numbers = (f", {key} {told[key]}" for key in ("cpu family", "model") if key in told)
    return name + "".join(numbers)


def _machine(dtype: str) -> str:
    """A name of what a measurement depends on: processor, cores allowed, jaxlib, dtype."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    quota = ""
    if os.path.exists("/sys/fs/cgroup/cpu.max"):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota = file.read().strip()
    facts = f"{processor()}|{platform.machine()}|{allowed}|{quota}|{jax.lib.__version__}|{dtype}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _best_kept(path: epath.Path, machine: str, flops: float) -> float:
    """The largest of `flops` and what is kept for the machine; it is kept from now on.

    A busy machine measures low: the best of all processes comes near to what it can do.
    """
    try:
        kept = json.loads(path.read_text())
        best = max(flops, float(kept.get(machine, 0.0)))
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged
        kept, best = {}, flops
    if kept.get(machine) != best:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({**kept, machine: best}))
        partial.replace(path)
    return best
