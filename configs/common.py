"""What the configs share: the argument string and the sizes."""

from typing import Any

# name: layers, width, heads.  Heads of 32 to 128; the MLP is four times as wide.  The number of
# parameters that gives the name counts all but the embeddings.
LADDER = {
    "100k": (2, 64, 2),
    "300k": (3, 96, 3),
    "1m": (5, 128, 4),
    "3m": (7, 192, 6),
    "10m": (8, 320, 5),
    "30m": (10, 512, 8),
    "100m": (14, 768, 12),
    "300m": (24, 1024, 16),
    "1b": (24, 1920, 15),
    "3b": (32, 2816, 22),
    "7b": (32, 4096, 32),
}


def parse_argument(argument: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads "size=1m,debug": names with values, and switches.

    Args:
      argument: What stands after the colon of --config=FILE:...
      defaults: The names that the config takes, with their values when they are not given; a
        switch is one whose default is False.

    Raises:
      ValueError: A name that the config does not take, or a switch with a value.
    """
    values = dict(defaults)
    for word in filter(None, (argument or "").split(",")):
        name, equals, value = word.partition("=")
        if name not in defaults:
            raise ValueError(f"--config: no argument {name!r}; known: {', '.join(defaults)}")
        if (defaults[name] is False) == bool(equals):
            form = name if defaults[name] is False else f"{name}=VALUE"
            raise ValueError(f"--config: argument {word!r} must be written {form}")
        values[name] = value if equals else True
    return values


def choose(name: str, value: str, table: dict[str, Any]) -> Any:
    """The table's entry.

    Raises:
      ValueError: The table has none of that name.
    """
    if value not in table:
        raise ValueError(f"--config: {name}={value} is not one of {', '.join(table)}")
    return table[value]
