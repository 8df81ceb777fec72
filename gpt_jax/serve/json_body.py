"""JSON as strict as a public port needs: what it says is what every reader would read."""

import json
import math
import re
from typing import Any

from gpt_jax.serve.errors import ApiError, bad_request

# A JSON schema nests by two levels for each of its own; compilers of schemas recurse.
MAX_DEPTH = 64
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(body: bytes) -> dict[str, Any]:
    """An object.

    Args:
      body: UTF-8.

    Raises:
      ApiError: 400: it is empty, not UTF-8, not JSON, not an object, nested too deep; it holds NaN,
        an infinite or endless number, a name twice, or half of a surrogate pair.
    """
    if not body.strip():
        raise bad_request(None, "The body is empty; it must be a JSON object.")
    _check_depth(body)
    try:
        value = json.loads(
            body.decode(),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
    except UnicodeDecodeError as error:
        raise bad_request(None, f"The body is not UTF-8: byte {error.start}.") from None
    except ValueError as error:  # JSONDecodeError is one, and so is an integer of 5,000 digits
        reason = " ".join(str(error).split())[:200]
        raise bad_request(None, f"The body is not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise bad_request(None, "The body must be a JSON object.")
    # Only an escape can bring half of a surrogate pair: UTF-8 has none.
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        _check_strings(value)
    return value


def _check_depth(body: bytes) -> None:
    depth = 0
    for match in _TOKENS.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise bad_request(None, f"The body nests deeper than {MAX_DEPTH} levels.")
        elif first in b"]}":
            depth -= 1


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, _ in pairs:
            if name not in found:
                raise ValueError(f"{name[:100]!r} stands twice in an object")
            del found[name]
    return found


def _check_strings(value: Any) -> None:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ApiError(400, "The body holds half of a surrogate pair.") from None
