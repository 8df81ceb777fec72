"""Damaged and unfinished steps as folders: moved aside or swept up, and what a disk has to give."""

import os
import re
import shutil
import warnings
from collections.abc import Collection

from etils import epath

from gpt_jax.parallel.distributed import peers

_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_DAMAGED = re.compile(r"\d+\.damaged(\.\d+)?")


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, or was not saved."""


def move_aside(folder: epath.Path, step: int) -> epath.Path:
    """Renames a step's folder, so that nothing reads it and nobody loses it; its new path."""
    taken = damaged(folder)
    names = [f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, len(taken) + 3))]
    moved = folder / next(name for name in names if name not in taken)
    if peers().is_first and (folder / str(step)).exists():
        (folder / str(step)).rename(moved)
    peers().arrive("after moving a damaged checkpoint")
    return moved


def damaged(folder: epath.PathLike) -> list[str]:
    """The names of the damaged steps that were moved aside."""
    return _matching(epath.Path(folder), _DAMAGED)


def sweep(folder: epath.Path) -> None:
    """Removes what unfinished saves left: it holds space, and is of no use."""
    if peers().is_first:
        for name in _matching(folder, _UNFINISHED):
            shutil.rmtree(os.fspath(folder / name), ignore_errors=True)
    peers().arrive("after sweeping up unfinished checkpoints")


def refuse_unwritable(folder: epath.PathLike) -> None:
    """Makes a folder, unless it is there, and asks whether it takes files; writes none to know.

    Raises:
      ValueError: It does not.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"--workdir: {os.fspath(folder)!r} cannot be made: {why}") from None
    if not is_writable(folder):
        raise ValueError(f"--workdir: {os.fspath(folder)!r} is not ours to write")


def is_writable(folder: epath.Path) -> bool:
    """Whether files can be made in a folder, as far as rights and mounts say."""
    path = os.fspath(folder)
    ask_as = {"effective_ids": os.access in os.supports_effective_ids}
    return "://" in path or os.access(path, os.W_OK | os.X_OK, **ask_as)


def space(folder: epath.Path, needed: int) -> str:
    """How much a save needs and how much there is, in words."""
    text = f"it needs up to {needed:,} bytes"
    if "://" in os.fspath(folder):
        return text
    return f"{text}, {shutil.disk_usage(os.fspath(folder)).free:,} are free"


def steps_in_words(steps: Collection[int]) -> str:
    """ "the last good step is 7", or that there is none."""
    return f"the last good step is {max(steps)}" if steps else "no step is saved"


def warn(message: str) -> None:
    """Says it on the standard error, once for each message."""
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def _matching(folder: epath.Path, pattern: re.Pattern) -> list[str]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(name for name in names if pattern.fullmatch(name))
