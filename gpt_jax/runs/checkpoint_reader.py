"""Reads the checkpoints of a run, and finds the newest that is as it was saved."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from gpt_jax import trees
from gpt_jax.parallel.distributed import peers
from gpt_jax.runs import canonical, quarantine
from gpt_jax.runs.leaf_digests import leaf_digests
from gpt_jax.runs.manifest import (
    DamagedError,
    check_digest,
    check_leaves,
    check_manifest,
    is_damage,
    reason,
)
from gpt_jax.runs.quarantine import warn
from gpt_jax.runs.read_back import PARAMS, REST
from gpt_jax.runs.state import first_flags
from gpt_jax.types import Tree

MANIFEST = "manifest"


class CheckpointReader:
    """The folder `checkpoints/` of a run, to be read.

    Args:
      directory: The folder.
    """

    def __init__(self, directory: epath.PathLike):
        # Orbax wants an absolute path; a URL is one.
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self._verified: set[int] = set()  # steps that were read whole and were as they were saved
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(create=False)
        return ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps that are saved, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """A TrainState of the structure and shardings of `like`, and the saved metadata.

        Args:
          step: One of steps().
          like: ShapeDtypeStructs with shardings.

        Raises:
          ValueError: A leaf is missing or has another shape.
          DamagedError: A file cannot be read, or the bits of a leaf are not those saved.
        """
        manifest, target = self.manifest(step), canonical.stacked_target(like)
        # Flags that came later than the checkpoint are as in a run that begins.
        later = {f"flags/{name}": flag for name, flag in first_flags().items()}
        new = {name: x for name, x in later.items() if name not in manifest["leaves"]}
        new = {name: x for name, x in new.items() if target.pop(name, None) is not None}
        check_leaves(target, manifest, f"checkpoint {step}")
        state = self._read(step, target, manifest, like, new)
        self._verified.add(step)
        return state, manifest

    def restore_params(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The parameters alone and the metadata; as `restore`."""
        manifest, like = self.manifest(step), {PARAMS: like}
        target = canonical.stacked_target(like)
        leaves = manifest["leaves"].items()
        saved = {name: leaf for name, leaf in leaves if name.startswith(f"{PARAMS}/")}
        check_leaves(target, {"leaves": saved}, f"checkpoint {step}")
        return self._read(step, target, manifest, like)[PARAMS], manifest

    def newest_good(
        self, like: Any, choose: Callable[[list[int]], int] = max
    ) -> tuple[Any, dict[str, Any], int]:
        """The newest state that is as it was saved, its metadata and its step; as `restore`.

        Of the damaged ones that are passed over a CheckpointWarning tells. With `choose` it is the
        step that is chosen of those left.

        Raises:
          ValueError: A leaf is missing or has another shape; or there is no good step.
        """
        return self._first_good(choose, lambda step: self.restore(step, like))

    def good_params(
        self, choose: Callable[[list[int]], int], like: Tree
    ) -> tuple[Tree, dict[str, Any], int]:
        """Parameters as `newest_good` gives a state, of the step that is chosen of those left."""
        return self._first_good(choose, lambda step: self.restore_params(step, like))

    def _first_good(self, choose: Callable, read: Callable) -> tuple[Any, dict[str, Any], int]:
        bad: dict[int, str] = {}
        while True:
            steps = [step for step in self.steps() if step not in bad]
            if not steps:
                told = "; ".join(bad.values()) or quarantine.damaged(self.directory)
                raise ValueError(f"checkpoints: none in {self.directory} is good: {told}")
            try:
                state, manifest = read(step := choose(steps))
                break
            except DamagedError as error:
                bad[step] = str(error)
        for damaged, told in bad.items():
            warn(f"{told}{self._dealt_with(damaged)}; step {step} is used instead")
        return state, manifest, step

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()

    def _dealt_with(self, step: int) -> str:
        """What was done about a damaged step, in words: who only reads does nothing."""
        del step
        return ""

    def manifest(self, step: int) -> dict[str, Any]:
        """The shape, dtype and digest of each leaf, and the metadata.

        Raises:
          ValueError: There is no such step.
          DamagedError: Its manifest is not as it was saved.
        """
        if step not in self.steps():
            raise ValueError(
                f"step: {step} is not among the saved steps {self.steps()} of {self.directory}"
            )
        composite = ocp.args.Composite(**{MANIFEST: ocp.args.JsonRestore()})
        with self._reading(step):
            manifest = self._manager.restore(step, args=composite)[MANIFEST]
        return check_manifest(manifest, f"checkpoint {step}")

    def _read(
        self, step: int, target: dict, manifest: dict, like: Any, new: dict | None = None
    ) -> Any:
        """The arrays of `target`, whose digests must be those of the manifest, in `like`'s form.

        `new` are arrays that it has besides those of `target`.
        """
        params, rest = split_items(target)
        items = {PARAMS: ocp.args.StandardRestore(params)}
        if rest:
            items[REST] = ocp.args.StandardRestore(rest)
        with self._reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            arrays = join_items(restored[PARAMS], restored[REST] if rest else {})
            jax.block_until_ready(arrays)
        digests = jax.device_get(leaf_digests(arrays))
        for name, words in digests.items():
            check_digest(name, words, manifest, f"checkpoint {step}")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(lambda xs: canonical.unstack(xs, like), out_shardings=shardings)(
            arrays | (new or {})
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what the files are to blame for into a DamagedError: in all processes.

        Each reads its own part of the files, and all must use the same step.
        """
        damage = None
        try:
            yield
        except Exception as error:
            if not is_damage(error):
                raise
            damage = error
        told = peers().exchange(f"after reading checkpoint {step}", damage and reason(damage))
        found = next((text for text in told if text is not None), None)
        if found is not None:
            where = self.directory / str(step)
            raise DamagedError(f"checkpoint {step}: {where} is damaged: {found}") from damage


def split_items(arrays: dict) -> tuple[Tree, Tree]:
    nested = traverse_util.unflatten_dict(arrays, sep="/")
    params = nested.pop(PARAMS)
    return params, nested


def join_items(params: Tree, rest: Tree) -> dict:
    return trees.flatten({PARAMS: params, **rest})
