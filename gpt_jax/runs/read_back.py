"""Reads what a checkpoint's files hold, to know whether it is what was saved: on the host alone."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from gpt_jax import trees
from gpt_jax.ops.digests import digest_on_host
from gpt_jax.runs.manifest import check_digest

# An item of the checkpoint of its own; everything else is in the other one.
PARAMS, REST = "params", "rest"
_AT_A_TIME = 1 << 26  # bytes


def read_back(folder: epath.Path, manifest: dict[str, Any], where: str) -> None:
    """Reads every leaf, a few at a time, and compares its digest.

    Args:
      folder: Of the step.
      manifest: The step's.
      where: What the step is called in a message.

    Raises:
      DamagedError: A leaf is not what was saved.
      Exception: Whatever Orbax says of files that it cannot read.
    """
    for part in _parts(manifest["leaves"]):
        for name, array in _leaves(folder, part).items():
            check_digest(name, digest_on_host(array), manifest, where)


def _parts(leaves: dict[str, Any]) -> Iterator[list[str]]:
    """Names of leaves of one item, as many as may be held in memory."""
    for in_params in (True, False):
        part, size = [], 0
        for name, leaf in leaves.items():
            if name.startswith(f"{PARAMS}/") != in_params:
                continue
            nbytes = math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize
            if part and size + nbytes > _AT_A_TIME:
                yield part
                part, size = [], 0
            part, size = [*part, name], size + nbytes
        if part:
            yield part


def _leaves(folder: epath.Path, names: list[str]) -> dict[str, np.ndarray]:
    nested = traverse_util.unflatten_dict(dict.fromkeys(names, 0), sep="/")
    item, target = (PARAMS, nested[PARAMS]) if PARAMS in nested else (REST, nested)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(
            folder / item,
            args=ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True),
        )
    return trees.flatten({PARAMS: found} if item == PARAMS else found)
