"""The device mesh, from its config."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gpt_jax.parallel.config import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of AXES over the devices (default: all of them).

    On TPU neighbours in the mesh are neighbours in the slice; several slices, joined by the
    data-centre network alone, lie along `data`, which needs the least of it.

    Raises:
      ValueError: The sizes do not fit the number of devices, or `data` that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(f"mesh.data: {shape[0]} is not a multiple of the {slices} slices")
        inside = (shape[0] // slices, *shape[1:])
        across = (slices, *(1,) * (len(AXES) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
        return Mesh(grid, AXES, axis_types=types)
    if len(devices) == jax.device_count() or devices[0].platform == "tpu":
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
