"""JSON of folders that others made.  Starts no JAX."""

import json
from typing import Any


def read_json(path) -> dict[str, Any]:
    """The object of a file; an empty one where there is no such file.

    Raises:
      ValueError: It is no JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # bytes that are no text are the first
        raise ValueError(f"init.source: {path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"init.source: {path} holds no JSON object")
    return values
