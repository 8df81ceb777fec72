"""Checkpoints of a run: the one module that touches Orbax."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gpt_jax import trees
from gpt_jax.data import hashing
from gpt_jax.parallel.distributed import peers
from gpt_jax.runs import canonical, quarantine
from gpt_jax.runs.checkpoint_reader import MANIFEST, CheckpointReader, split_items
from gpt_jax.runs.leaf_digests import leaf_digests, thrifty_leaf_digests
from gpt_jax.runs.manifest import (
    hex_words,
    is_damage,
    make_manifest,
    reason,
)
from gpt_jax.runs.quarantine import steps_in_words, warn
from gpt_jax.runs.read_back import PARAMS, REST, read_back
from gpt_jax.runs.retention import Retention
from gpt_jax.types import Tree

# Two items, so that a reader of parameters never touches the optimizer's slots.
_IN_FLIGHT = 1 << 26  # bytes that are written at a time where memory counts more than speed
_MOST_FAILURES = 3  # saves in a row
_STRAY_SECONDS = 5  # that those threads of a failed save are waited for which may never end


class SaveError(RuntimeError):
    """Steps cannot be saved."""


_stack = jax.jit(canonical.stack)


def _canonical(state: Any) -> dict[str, jax.Array]:
    """The state's arrays in the canonical layout.

    On CPU always copies: what Orbax writes in the background may otherwise be the very memory that
    the next step is given. Elsewhere Orbax copies to the host first.
    """
    leaves = trees.flatten(state)
    on_cpu = next(iter(jax.tree.leaves(state)[0].devices())).platform == "cpu"
    return _stack(state) if on_cpu or not canonical.is_canonical(leaves) else leaves


def _wait_for_strays(running: list[threading.Thread]) -> None:
    """Returns when the threads that were started since have ended.

    A save that fails at once leaves those that write its other parts, and Orbax waits for none of
    them: they would go on writing where the same step is saved next.
    """
    deadline = time.monotonic() + _STRAY_SECONDS
    while not set(threading.enumerate()).issubset(running) and time.monotonic() < deadline:
        time.sleep(0.01)


class Checkpoints(CheckpointReader):
    """The folder `checkpoints/` of a run: one folder a step, written asynchronously.

    A step's folder appears by a rename when all of it is written, and older steps go only then: a
    run that is killed while saving leaves them untouched. Before an older step goes, one of those
    that stay must have been read back and be as it was saved (on one host; on several, the one
    that the run was continued from stays).

    Args:
      directory: The folder.
      keep: How many of the newest steps are kept, besides the best ones that `save` is told.
      keep_every: The first step at or after each multiple of it is kept too; 0: none of them.
      in_flight: Bytes that a save may hold beside the arrays, at least those of the largest. The
        arrays must then stay as they are until it is complete. None: as many as make it fast.

    Raises:
      ValueError: The folder is to be written and cannot be.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        keep_every: int = 0,
        in_flight: int | None = None,
    ):
        self._retention = Retention(keep, keep_every)
        self._in_flight = in_flight
        self._saving: int | None = None  # the step of the save under way
        self._bytes = 0  # of its arrays
        self._failure: BaseException | None = None  # of the last save
        self._failures = 0  # in a row
        quarantine.refuse_unwritable(directory)
        super().__init__(directory)
        self._retention.verified = self._verified

    def _open(self) -> ocp.CheckpointManager:
        quarantine.sweep(self.directory)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._retention)
        handlers = None
        if self._in_flight:
            # Orbax counts in 10^9 bytes, and must not round it down.
            gigabytes = (self._in_flight + 1000) / 1e9
            handler = ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes)
            handlers = {PARAMS: handler, MANIFEST: ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any],
        best: Iterable[int] = (),
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Saves in the background; returns when the arrays are copied, so that they may be donated.

        A save that fails leaves no step; a CheckpointWarning says why, and the run may go on.

        Args:
          step: Its name.
          state: A TrainState; parameters that are None (frozen ones) are not part of it.
          metadata: JSON values.
          best: Steps (runs.best.best_steps) that are kept besides the newest.
          before: What must be done before the step is there; an OSError of it fails the save.

        Raises:
          SaveError: It is the third in a row that failed.
        """
        self.settle()
        failure = None
        try:
            before()
        except OSError as error:
            failure = error
        if failure := self._failure_of_any(failure):
            self._saving = step
            self._failed(failure)
            return
        self._retention.best = frozenset(best)
        self._keep_a_sound_one(step)
        if self._in_flight and canonical.is_canonical(leaves := trees.flatten(state)):
            arrays, digests = leaves, thrifty_leaf_digests(leaves)
        else:
            arrays = _canonical(state)
            digests = jax.device_get(leaf_digests(arrays))
        manifest = make_manifest(arrays, digests, metadata)
        params, rest = split_items(arrays)
        items = {PARAMS: ocp.args.StandardSave(params), MANIFEST: ocp.args.JsonSave(manifest)}
        if rest:  # Orbax does not save what is empty
            items[REST] = ocp.args.StandardSave(rest)
        self._saving, self._failure = step, None
        self._bytes = sum(array.nbytes for array in arrays.values())
        running = threading.enumerate()
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            failure = error
            self._close_manager()
            _wait_for_strays(running)
        if failure := self._failure_of_any(failure):
            self._failed(failure)

    def settle(self) -> bool:
        """Returns when the save under way is complete: whether it, or else the last one, was.

        Raises:
          SaveError: It is the third in a row that failed.
        """
        step = self._saving
        if step is not None:
            failure = None
            try:
                self._manager.wait_until_finished()
                if not (self.directory / str(step)).exists():
                    raise FileNotFoundError(f"{self.directory / str(step)} was not made")
            except Exception as error:
                failure = error
            if failure := self._failure_of_any(failure):
                self._failed(failure)
            else:
                self._saving, self._failures = None, 0
        return self._failure is None

    def _failure_of_any(self, failure: BaseException | None) -> BaseException | None:
        """What failed here, or else in another process: a save is all processes' or none's."""
        told = peers().exchange("after a save", failure and reason(failure))
        for process, text in enumerate(told):
            if failure is None and text is not None:
                failure = SaveError(f"{text} ({peers().name(process)})")
        return failure

    def wait(self) -> None:
        """Returns when the save under way is complete and no step is left that need not be kept.

        Raises:
          SaveError: The last save failed.
        """
        if not self.settle():
            raise SaveError(f"{reason(self._failure)}; {steps_in_words(self.steps())}")
        steps = self.steps()
        extra = set(steps) - self._retention.of(steps, heed_verified=False)
        if extra and jax.process_count() == 1 and self._is_sound_or_moved(steps[-1]):
            for step in extra:
                self._manager.delete(step)

    def discard_after(self, step: int) -> None:
        """Deletes the steps behind one that the run has gone back to: it comes to them again."""
        self.settle()
        for later in [other for other in self.steps() if other > step]:
            self._manager.delete(later)
            self._verified.discard(later)

    def close(self) -> None:
        """Waits, then releases Orbax's threads; a save that fails then is a warning."""
        self._failures = 0  # nothing more to give up
        self.settle()
        self._manager.close()

    def _close_manager(self) -> None:
        with contextlib.suppress(Exception):  # it may tell the last save's error again
            self._manager.close()

    def _failed(self, error: BaseException) -> None:
        """Gets rid of what a failed save left, in the folder and in Orbax's memory of its steps."""
        step, self._saving = self._saving, None
        self._failure, self._failures = error, self._failures + 1
        self._close_manager()
        self._manager = self._open()
        if step in self.steps():
            if jax.process_count() == 1 and self._is_sound(step):
                self._failure, self._failures = None, 0
                warn(f"checkpoint {step}: was saved, and then: {reason(error)}")
                return
            self._move_aside(step)
        told = f"checkpoint {step}: was not saved: {reason(error)}"
        told += f"; {quarantine.space(self.directory, self._bytes)}"
        told += f"; {steps_in_words(self.steps())}"
        if self._failures >= _MOST_FAILURES:
            raise SaveError(f"{told}; {self._failures} saves in a row failed") from error
        warn(told)

    def _keep_a_sound_one(self, step: int) -> None:
        """Sees to it that of the steps that stay when `step` is saved one has been read back."""
        while jax.process_count() == 1:
            steps = self.steps()
            kept = self._retention.of([*steps, step], heed_verified=False)
            if kept.issuperset(steps) or kept & self._verified:
                return
            if self._is_sound_or_moved(max(kept - {step}, default=steps[-1])):
                return

    def _is_sound_or_moved(self, step: int) -> bool:
        sound = self._is_sound(step)
        if not sound:
            moved = self._move_aside(step).name
            warn(f"checkpoint {step}: is not as it was saved; moved to {moved}")
        return sound

    def _is_sound(self, step: int) -> bool:
        """Reads all of a step back, on the host and a part at a time."""
        if step in self._verified:
            return True
        try:
            manifest = self.manifest(step)
            read_back(self.directory / str(step), manifest, f"checkpoint {step}")
        except Exception as error:
            if not is_damage(error):
                raise
            return False
        self._verified.add(step)
        return True

    def _dealt_with(self, step: int) -> str:
        return f"; moved to {self._move_aside(step).name}"

    def _move_aside(self, step: int) -> epath.Path:
        moved = quarantine.move_aside(self.directory, step)
        self._verified.discard(step)
        self._manager.reload()
        return moved


def save_params(directory: epath.PathLike, params: Tree, metadata: dict[str, Any]) -> None:
    """Saves parameters once, in a folder of their own that is made anew: a run's frozen ones.

    Args:
      directory: The folder; what it held is lost.
      params: Parameters; None where they are not part of it.
      metadata: JSON values.
    """
    if peers().is_first and epath.Path(directory).exists():
        epath.Path(directory).rmtree()
    peers().arrive("before saving frozen parameters")
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    checkpoints = Checkpoints(directory, keep=1, in_flight=max(largest, _IN_FLIGHT))
    try:
        checkpoints.save(0, {PARAMS: params}, metadata)
        checkpoints.wait()
    finally:
        checkpoints.close()


def restore_params(directory: epath.PathLike, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """What `save_params` saved, and the metadata; as `Checkpoints.restore_params`.

    Raises:
      ValueError: Nothing is saved there, or it does not fit `like`, or is damaged.
    """
    if not (epath.Path(directory) / "0").exists():
        raise ValueError(f"{os.fspath(directory)!r} holds no saved parameters")
    checkpoints = CheckpointReader(directory)
    try:
        return checkpoints.restore_params(0, like)
    finally:
        checkpoints.close()


def fingerprint(params: Tree) -> str:
    """Changes whenever a bit does; the same on any mesh, with layers stacked or not."""
    digests = jax.device_get(leaf_digests(_canonical(params)))
    return hashing.digest({name: hex_words(words) for name, words in digests.items()})
