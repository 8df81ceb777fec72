"""The device mesh, from its config."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt_jax.parallel.config import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of AXES over the devices (default: all of them).

    Raises:
      ValueError: The sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if len(devices) == jax.device_count():
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
