"""Strict loading: every parameter is loaded or named as new, every loaded one used or named."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gpt_jax.convert.table import listed
from gpt_jax.runs.config import InitConfig

# Parameters with a dim that goes by one field of the config: the place of the dim, and the field.
_SIZED_BY = {
    "tokens": (0, "model.vocab_size"),
    "head": (1, "model.vocab_size"),
    "mlm/bias": (0, "model.vocab_size"),
    "positions": (0, "model.seq_len"),
    "classifier/kernel": (1, "model.num_classes"),
    "classifier/bias": (0, "model.num_classes"),
}


def merge_strict(
    loaded: Mapping[str, Any], wanted: Mapping[str, Any], skip: Iterable[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """What a model takes of what a source holds.

    Args:
      loaded: The source's arrays by canonical path.
      wanted: The model's parameters by canonical path: anything with a shape.
      skip: Patterns (re.search) of parameters that start anew though the source may hold them, and
        of parameters of the source that are left out.
      where: The source, named in errors.

    Returns:
      The arrays to use, and the names of the model's parameters that keep their first values.

    Raises:
      ValueError: A parameter is neither loaded nor skipped, neither used nor skipped, or of another
        shape; or a pattern is none, or matches nothing.
    """
    skipped = set()
    for pattern in InitConfig(skip=tuple(skip)).skip:
        found = {name for name in {*loaded, *wanted} if re.search(pattern, name)}
        if not found:
            raise ValueError(
                f"init.skip: {pattern!r} matches no parameter of the model or of {where}"
            )
        skipped |= found
    missing = set(wanted) - set(loaded) - skipped
    unused = set(loaded) - set(wanted) - skipped
    if missing or unused:
        raise ValueError(
            f"init.skip: {where} lacks of the model's parameters: {listed(missing)}; the model "
            f"has no place for its: {listed(unused)}. To start the ones anew and leave the others "
            f"out, add {_patterns(missing | unused)}"
        )
    used = {name: loaded[name] for name in wanted if name not in skipped}
    for name, array in used.items():
        expected = tuple(wanted[name].shape)
        if tuple(array.shape) != expected:
            raise ValueError(_wrong_shape(name, tuple(array.shape), expected, where))
    return used, sorted(set(wanted) - set(used))


def _patterns(names: Iterable[str]) -> str:
    """Patterns for init.skip that match these names, a list short enough to be typed."""
    parts = [name.split("/") for name in names]
    return repr(sorted({f"^{part[0]}$" if len(part) == 1 else f"^{part[0]}/" for part in parts}))


def _wrong_shape(name: str, found: tuple, expected: tuple, where: str) -> str:
    shapes = f"{where}: {name} is {list(found)}, but the model's {list(expected)}"
    place, field = _SIZED_BY.get(name, (0, ""))
    differ = [i for i, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1]
    if not field or differ != [place]:
        return f"init.source: {shapes}"
    what = ", the source's vocabulary" if field == "model.vocab_size" else ""
    return (
        f"{field}: {shapes}: give {found[place]}{what}; or begin with a new one by adding "
        f"{_patterns([name])} to init.skip"
    )
