"""Checkpoints of a run: the one module that touches Orbax."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from gpt_jax import trees
from gpt_jax.data import hashing
from gpt_jax.ops.digests import digest
from gpt_jax.runs import canonical
from gpt_jax.types import Tree

# Two items, so that a reader of parameters never touches the optimizer's slots.
_PARAMS, _REST, _MANIFEST = "params", "rest", "manifest"
# Bytes that are written at a time where memory counts more than speed, and that are hashed.
_IN_FLIGHT, _PIECE = 1 << 26, 1 << 22


_stack = jax.jit(canonical.stack)


def _canonical(state: Any) -> dict[str, jax.Array]:
    """The state's arrays in the canonical layout.

    On CPU always copies: what Orbax writes in the background may otherwise be the very memory that
    the next step is given. Elsewhere Orbax copies to the host first.
    """
    leaves = trees.flatten(state)
    on_cpu = next(iter(jax.tree.leaves(state)[0].devices())).platform == "cpu"
    return _stack(state) if on_cpu or not canonical.is_canonical(leaves) else leaves


@jax.jit
def _digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: digest(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames=("size",))
def _digest_of_piece(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Of so many rows from row `start` on."""
    piece = jax.lax.dynamic_slice_in_dim(array, start, size)
    return digest(piece, start * jnp.uint32(math.prod(array.shape[1:]) % 2**32))


def _thrifty_digests(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """As `_digests`, in programs that hold the bits of pieces of an array at a time."""
    return {name: _thrifty_digest(array) for name, array in arrays.items()}


def _thrifty_digest(array: jax.Array) -> np.ndarray:
    if array.nbytes <= _PIECE or len(array.sharding.device_set) > 1:
        # A piece of an array that lies on several devices would have to be gathered.
        return jax.device_get(_digests({"": array}))[""]
    size = max(1, _PIECE * array.shape[0] // array.nbytes)
    words = np.zeros(2, np.uint32)
    for start in range(0, array.shape[0], size):
        size = min(size, array.shape[0] - start)
        words += jax.device_get(_digest_of_piece(array, np.uint32(start), size))
    return words


@dataclasses.dataclass
class _Retention:
    """Orbax's preservation policy: the newest `keep` steps (None: all) and those in `best`."""

    keep: int | None
    best: frozenset[int] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = sorted(steps) if self.keep is None else sorted(steps)[-self.keep :]
        return [step in newest or step in self.best for step in steps]


class Checkpoints:
    """The folder `checkpoints/` of a run: one folder a step, written asynchronously.

    A step's folder appears by a rename when all of it is written, and older steps go only then: a
    run that is killed while saving leaves them untouched.

    Args:
      directory: The folder.
      keep: How many of the newest steps are kept, besides the best ones that `save` is told; None:
        the folder is only read.
      in_flight: Bytes that a save may hold beside the arrays, at least those of the largest. The
        arrays must then stay as they are until it is complete. None: as many as make it fast.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int | None = None,
        in_flight: int | None = None,
    ):
        # Orbax wants an absolute path; a URL is one.
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self._retention = _Retention(keep)
        self._in_flight = in_flight
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            cleanup_tmp_directories=keep is not None,
            create=keep is not None,
        )
        handlers = None
        if in_flight:
            # Orbax counts in 10^9 bytes, and must not round it down.
            handler = ocp.StandardCheckpointHandler(save_concurrent_gb=(in_flight + 1000) / 1e9)
            handlers = {_PARAMS: handler, _MANIFEST: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def steps(self) -> list[int]:
        """Steps that are saved, oldest first; after `wait`, all of them whole."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, metadata: dict[str, Any], best: Iterable[int] = ()
    ) -> None:
        """Saves in the background; returns when the arrays are copied, so that they may be donated.

        Args:
          step: Its name.
          state: A TrainState; parameters that are None (frozen ones) are not part of it.
          metadata: JSON values.
          best: Steps (runs.best.best_steps) that are kept besides the newest.
        """
        self._retention.best = frozenset(best)
        if self._in_flight and canonical.is_canonical(leaves := trees.flatten(state)):
            arrays, digests = leaves, _thrifty_digests(leaves)
        else:
            arrays = _canonical(state)
            digests = jax.device_get(_digests(arrays))
        manifest = {
            "leaves": {
                name: {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "digest": _hex(digests[name]),
                }
                for name, array in arrays.items()
            },
            **metadata,
        }
        params, rest = _split(arrays)
        items = {_PARAMS: ocp.args.StandardSave(params), _MANIFEST: ocp.args.JsonSave(manifest)}
        if rest:  # Orbax does not save what is empty
            items[_REST] = ocp.args.StandardSave(rest)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """A TrainState of the structure and shardings of `like`, and the saved metadata.

        Args:
          step: One of steps().
          like: ShapeDtypeStructs with shardings.

        Raises:
          ValueError: A leaf is missing, has another shape, or its bits are not those saved.
        """
        manifest = self._manifest(step)
        target = canonical.stacked_target(like)
        _check_leaves(target, manifest, f"checkpoint {step}")
        params, rest = _split(target)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _PARAMS: ocp.args.StandardRestore(params),
                    _REST: ocp.args.StandardRestore(rest),
                }
            ),
        )
        arrays = _join(restored[_PARAMS], restored[_REST])
        return self._verified(step, arrays, manifest, like), manifest

    def restore_params(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The parameters alone and the metadata; as `restore`."""
        manifest = self._manifest(step)
        like = {_PARAMS: like}
        target = canonical.stacked_target(like)
        saved = {
            **manifest,
            "leaves": {
                name: leaf
                for name, leaf in manifest["leaves"].items()
                if name.startswith(f"{_PARAMS}/")
            },
        }
        _check_leaves(target, saved, f"checkpoint {step}")
        params, _ = _split(target)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**{_PARAMS: ocp.args.StandardRestore(params)})
        )
        arrays = _join(restored[_PARAMS], {})
        return self._verified(step, arrays, saved, like)[_PARAMS], manifest

    def wait(self) -> None:
        """Returns when the save under way is complete; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        self._manager.close()

    def _manifest(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            raise ValueError(
                f"step: {step} is not among the saved steps {self.steps()} of {self.directory}"
            )
        composite = ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=composite)[_MANIFEST]

    def _verified(self, step: int, arrays: dict, manifest: dict, like: Any) -> Any:
        digests = jax.device_get(_digests(arrays))
        for name, value in digests.items():
            saved = manifest["leaves"][name]["digest"]
            if _hex(value) != saved:
                raise ValueError(
                    f"checkpoint {step}: {name} is damaged: digest {_hex(value)}, saved as {saved} "
                    f"({self.directory / str(step)})"
                )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(lambda xs: canonical.unstack(xs, like), out_shardings=shardings)(arrays)


def save_params(directory: epath.PathLike, params: Tree, metadata: dict[str, Any]) -> None:
    """Saves parameters once, in a folder of their own that is made anew: a run's frozen ones.

    Args:
      directory: The folder; what it held is lost.
      params: Parameters; None where they are not part of it.
      metadata: JSON values.
    """
    if epath.Path(directory).exists():
        epath.Path(directory).rmtree()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    checkpoints = Checkpoints(directory, keep=1, in_flight=max(largest, _IN_FLIGHT))
    try:
        checkpoints.save(0, {_PARAMS: params}, metadata)
    finally:
        checkpoints.close()  # waits


def restore_params(directory: epath.PathLike, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """What `save_params` saved, and the metadata; as `Checkpoints.restore_params`.

    Raises:
      ValueError: Nothing is saved there, or it does not fit `like`, or is damaged.
    """
    if not (epath.Path(directory) / "0").exists():
        raise ValueError(f"{os.fspath(directory)!r} holds no saved parameters")
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_params(0, like)
    finally:
        checkpoints.close()


def fingerprint(params: Tree) -> str:
    """Changes whenever a bit does; the same on any mesh, with layers stacked or not."""
    digests = jax.device_get(_digests(_canonical(params)))
    return hashing.digest({name: _hex(words) for name, words in digests.items()})


def _check_leaves(target: dict, manifest: dict, where: str) -> None:
    saved = manifest["leaves"]
    missing, unused = sorted(set(target) - set(saved)), sorted(set(saved) - set(target))
    if missing or unused:
        raise ValueError(f"{where}: not saved but wanted: {missing}; saved but unused: {unused}")
    for name, leaf in target.items():
        shape, dtype = tuple(saved[name]["shape"]), saved[name]["dtype"]
        if (shape, dtype) != (leaf.shape, str(leaf.dtype)):
            raise ValueError(
                f"{where}: {name} is {dtype}{list(shape)}, but the config makes it "
                f"{leaf.dtype}{list(leaf.shape)}"
            )


def _split(arrays: dict) -> tuple[Tree, Tree]:
    nested = traverse_util.unflatten_dict(arrays, sep="/")
    params = nested.pop(_PARAMS)
    return params, nested


def _join(params: Tree, rest: Tree) -> dict:
    return trees.flatten({_PARAMS: params, **rest})


def _hex(words: np.ndarray) -> str:
    return "".join(f"{int(word):08x}" for word in words)
