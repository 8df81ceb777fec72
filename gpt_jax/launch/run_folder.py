"""What a run directory says of how far its run is.  Starts no JAX."""

import json
import pathlib
from typing import Any


def newest_step(workdir: pathlib.Path) -> int:
    """The newest checkpoint; -1: there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def read_receipt(workdir: pathlib.Path) -> dict[str, Any]:
    """The receipt of a run; empty: it has none yet."""
    path = workdir / "receipt.json"
    return json.loads(path.read_text()) if path.exists() else {}


def halted_at(receipt: dict[str, Any]) -> int | None:
    """The step that the last session halted for: its loss was not finite."""
    return (receipt.get("sessions") or [{}])[-1].get("first_nonfinite")
