"""Errors that name a field by the name under which the caller knows it.  Starts no JAX."""

import contextlib
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the field with which the text of a ValueError begins.

    Args:
      names: Field -> the caller's name of it. Other errors pass as they are.
    """
    try:
        yield
    except ValueError as error:
        field, colon, rest = str(error).partition(": ")
        if not colon or field not in names:
            raise
        raise ValueError(f"{names[field]}: {rest}") from None


def source_names(field: str) -> dict[str, str]:
    """What parts of a source are called whose whole spec the caller gave as `field`."""
    parts = ("init.source", "--run", "data.tokenizer", "data.eos_token", "tasks.template")
    return dict.fromkeys(parts, field)
