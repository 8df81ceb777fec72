"""What the configs share: the argument string and the debug form."""

from typing import Any


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


def shrink(config: Any) -> None:
    """Makes a config run in seconds on a CPU, on the code path that it has anyway."""
    model = config.model
    if model.get("num_kv_heads", 0):
        model.num_kv_heads = 1
    for name in ("head_dim", "mlp_dim"):
        if model.get(name, 0):
            model[name] = 0
    model.num_layers, model.embed_dim, model.num_heads = 2, 32, 2
    config.data.seq_len = model.seq_len = 32
    if config.data.tokenizer == "bpe":
        config.data.vocab_size = model.vocab_size = 512
    config.train.batch_size = 8
    config.train.num_microbatches = min(2, config.train.get("num_microbatches", 1))
    config.train.duration = "20 steps"
    config.train.eval_every = config.train.checkpoint_every = "10 steps"
    config.mesh.data, config.mesh.fsdp = -1, 1
