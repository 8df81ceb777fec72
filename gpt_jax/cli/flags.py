"""Mistakes are told by the option that was typed.  Starts no JAX."""

import argparse
import contextlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def named_as_typed(arguments: argparse.Namespace, **flags: str) -> Iterator[None]:
    """A ValueError that begins with the name of a field begins with that of its option.

    Args:
      arguments: Their names are those of options.
      **flags: Field -> option where the two differ.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        field = re.match(r"\w+(?=[.\[\]\w]*: )", text)
        name = field[0] if field else ""
        if name not in flags and not hasattr(arguments, name):
            raise
        raise ValueError(f"--{flags.get(name, name)}{text[len(name) :]}") from None
