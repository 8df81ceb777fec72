"""receipt.json: where a run's numbers come from."""

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import uuid
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "numpy",
)
_SECRET = re.compile(r"(?i)((?:key|token|secret|password)=)[^\s]+|\b(?:sk|hf)[-_][A-Za-z0-9_-]{8,}")
_MOST_DIFF = 1_000_000


def mask_secrets(text: str) -> str:
    """The text with what looks like a key or a password replaced by ***."""
    return _SECRET.sub(lambda found: f"{found[1] or ''}***", text)


def _git(*arguments: str) -> str | None:
    folder = epath.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def session(mesh: Mesh, start_step: int) -> dict[str, Any]:
    """What one start of the command adds to the receipt."""
    return {
        "start_step": start_step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [mask_secrets(argument) for argument in sys.argv],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": mask_secrets((_git("diff", "HEAD") or "")[:_MOST_DIFF]),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


def write_receipt(
    path: epath.PathLike, facts: dict[str, Any], new_session: dict[str, Any], *, anew: bool
) -> dict[str, Any]:
    """Writes the facts of the run and returns the receipt.

    Unless the run begins `anew`, its id and the sessions before this one are kept.
    """
    path = epath.Path(path)
    old = {"id": uuid.uuid4().hex[:8], "sessions": []}
    if not anew and path.exists():
        old = json.loads(path.read_text())
    receipt = {"id": old["id"], **facts, "sessions": [*old["sessions"], new_session]}
    write_json(path, receipt)
    return receipt


def last_session(path: epath.PathLike) -> dict[str, Any]:
    """What a receipt says of its last start."""
    return json.loads(epath.Path(path).read_text())["sessions"][-1]


def add_to_session(path: epath.PathLike, facts: dict[str, Any]) -> None:
    """Adds to the last session of a receipt what was not known when it was written."""
    path = epath.Path(path)
    receipt = json.loads(path.read_text())
    receipt["sessions"][-1].update(facts)
    write_json(path, receipt)


def write_json(path: epath.PathLike, values: Any) -> None:
    """Replaces a JSON file as a whole: a reader never sees half of it."""
    path = epath.Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)
