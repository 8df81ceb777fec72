"""What the configs share: the argument string and the debug form."""

from typing import Any

from ml_collections import ConfigDict


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


def small_optimizer(config: Any, learning_rate: float, muon: float = 0.0) -> None:
    """The optimizer of the small configs: AdamW, or Muon for the matrices of the layers."""
    config.optimizer = ConfigDict()
    config.optimizer.name = "muon" if muon else "adamw"
    config.optimizer.learning_rate = learning_rate
    if muon:
        config.optimizer.muon_learning_rate = muon
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = "5%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0 if muon else 0.01


def finetuned(
    source: str, tasks: tuple[str, ...], seq_len: int, objective: str, scratch: bool = False
) -> Any:
    """A config that begins from a run or another source; optimizer and durations are to be set.

    Args:
      source: `init.source`; its model and tokenizer are the config's.
      tasks: Their names.
      seq_len: Tokens of a row.
      objective: Its name.
      scratch: The source's model and tokenizer, but every parameter drawn anew.
    """
    config = ConfigDict()
    config.seed = 0
    config.init = ConfigDict({"source": source})
    if scratch:
        config.init.skip = (".",)
    config.data = ConfigDict({"seq_len": seq_len})
    config.model = ConfigDict()
    config.tasks = ConfigDict({"names": tasks, "eval_examples": 100})
    config.objective = ConfigDict({"name": objective})
    config.train = ConfigDict({"sample_prompts": ()})
    config.train.eval_every = config.train.checkpoint_every = "50%"
    return config


def classifier(
    source: str, task: str, seq_len: int, head: str, num_classes: int, metric: str, scratch: bool
) -> Any:
    """`finetuned` with a new head on an encoder; the best checkpoint by the metric is kept.

    Args:
      source, seq_len, scratch: See finetuned.
      task: Its name.
      head: "sequence" or "tokens".
      num_classes: Of the task.
      metric: The task's main one.
    """
    config = finetuned(source, (task,), seq_len, "labels", scratch)
    if not scratch:
        # The source's own head goes, the classifier is new.
        config.init.skip = ("^pooler/" if is_large(source) else "^mlm/", "^classifier/")
    config.model.head = head
    config.model.num_classes = num_classes
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.train.eval_every = config.train.checkpoint_every = "25%"
    config.train.keep_best = 1
    config.train.metric = f"{task}/{metric}"
    return config


def is_large(source: str) -> bool:
    """Whether a source is a published model, not one of the small runs of these configs."""
    return source.startswith(("hf:", "gguf:"))


def shrink(config: Any) -> None:
    """Makes a config run in seconds on a CPU, on the code path that it has anyway.

    A model that is inherited from a source stays as it is; rows and steps become few.
    """
    if "embed_dim" in config.model:
        _shrink_model(config)
    config.data.seq_len = min(32, config.data.seq_len) if "tasks" not in config else 128
    if config.data.get("tokenizer", "") == "bpe":
        config.data.vocab_size = config.model.vocab_size = 512
    if "tasks" in config:
        config.tasks.limit, config.tasks.eval_examples, config.tasks.max_new_tokens = 64, 8, 8
    config.train.batch_size = 8
    config.train.num_microbatches = min(2, config.train.get("num_microbatches", 1))
    config.train.duration = "20 steps"
    config.train.eval_every = config.train.checkpoint_every = "10 steps"
    config.train.eval_batches = 4
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})


def _shrink_model(config: Any) -> None:
    model = config.model
    if model.get("num_kv_heads", 0):
        model.num_kv_heads = 1
    for name in ("head_dim", "mlp_dim"):
        if model.get(name, 0):
            model[name] = 0
    model.num_layers, model.embed_dim, model.num_heads = 2, 32, 2
    model.seq_len = 128
