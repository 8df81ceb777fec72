"""What a checkpoint says of itself: each leaf's shape, dtype and digest, and the run's metadata."""

import errno
import json
from typing import Any

import jax
import numpy as np

from gpt_jax.data import hashing

_OWN = "manifest_digest"


class DamagedError(ValueError):
    """A checkpoint is not what was saved."""


def make_manifest(
    arrays: dict[str, jax.Array], digests: dict[str, np.ndarray], metadata: dict[str, Any]
) -> dict[str, Any]:
    """JSON values, with a digest of themselves."""
    leaves = {
        name: {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "digest": hex_words(digests[name]),
        }
        for name, array in arrays.items()
    }
    manifest = {"leaves": leaves, **metadata}
    return {**manifest, _OWN: _digest(manifest)}


def check_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """The manifest, if it is as it was made; old ones hold no digest of themselves.

    Raises:
      DamagedError: It is not.
    """
    if not isinstance(manifest, dict) or not isinstance(manifest.get("leaves"), dict):
        raise DamagedError(f"{where}: manifest is damaged: it names no leaves")
    rest = {name: value for name, value in manifest.items() if name != _OWN}
    if manifest.get(_OWN, _digest(rest)) != _digest(rest):
        raise DamagedError(f"{where}: manifest is damaged: its digest is not the one in it")
    return rest


def check_leaves(target: dict, manifest: dict, where: str) -> None:
    """Whether the leaves that are wanted are those that were saved.

    Raises:
      ValueError: They are not: the checkpoint is of another model or optimizer.
    """
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


def check_digest(name: str, words: np.ndarray, manifest: dict, where: str) -> None:
    """Whether a leaf's bits are those that were saved.

    Raises:
      DamagedError: They are not.
    """
    found, saved = hex_words(words), manifest["leaves"][name]["digest"]
    if found != saved:
        raise DamagedError(f"{where}: {name} is damaged: digest {found}, saved as {saved}")


def is_damage(error: BaseException) -> bool:
    """Whether an error while reading speaks of the files, not of memory, rights or devices."""
    ours = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    full = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, Exception) and not isinstance(error, ours) and not full


def reason(error: BaseException, most: int = 300) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}" + ("..." if len(text) > most else "")


def hex_words(words: np.ndarray) -> str:
    """A digest as text."""
    return "".join(f"{int(word):08x}" for word in words)


def _digest(manifest: dict) -> str:
    return hashing.digest(json.loads(json.dumps(manifest)))
