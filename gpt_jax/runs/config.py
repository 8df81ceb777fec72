"""The config of a run as frozen dataclasses: here dicts and JSON stop.  Starts no JAX."""

import ast
import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

from gpt_jax.data.config import MIN_VOCAB_SIZE, DataConfig
from gpt_jax.models.config import TransformerConfig
from gpt_jax.objectives.config import ObjectiveConfig
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.runs.train_config import TrainConfig
from gpt_jax.tasks.config import TasksConfig


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the first parameters come from.

    Attributes:
      source: A run directory, "hf:DIR" (a Hugging Face folder) or "gguf:FILE"; "": drawn at random.
        What the model section does not say is then the source's.
      step: A run's checkpoint; -1: the best by its own metric if it keeps such, else the newest.
      skip: Regular expressions of parameters that need not be in both; any other that only one
        side has is an error.
      word_vectors: Initial token embeddings: a file in the text format of word2vec or GloVe, or
        "skipgram": trained on the run's own corpus (arXiv:1310.4546).
    """

    source: str = ""
    step: int = -1
    skip: tuple[str, ...] = ()
    word_vectors: str = ""

    def __post_init__(self):
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"init.skip: {pattern!r} is no regular expression: {error}"
                ) from None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run: what `config.json` holds.

    Attributes:
      seed: Of the initial parameters, the dropout, the corruption of rows and the data order.
    """

    seed: int
    model: TransformerConfig
    data: DataConfig
    tasks: TasksConfig
    objective: ObjectiveConfig
    init: InitConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig

    def __post_init__(self):
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: {self.seed!r} is not in [0, 2^31)")
        # A row of pairs is two sequences, whose positions begin anew.
        sequences = 2 if self.objective.name == "dpo" else 1
        if self.data.seq_len > sequences * self.model.seq_len:
            longest = f"{sequences} times " if sequences > 1 else ""
            raise ValueError(
                f"data.seq_len: {self.data.seq_len} is over {longest}model.seq_len "
                f"{self.model.seq_len}, the longest sequence the model takes"
            )
        if self.tasks.source_len > self.model.seq_len:
            raise ValueError(
                f"tasks.source_len: {self.tasks.source_len} is over model.seq_len "
                f"{self.model.seq_len}, the longest sequence the model takes"
            )
        wanted = {"bpe": self.data.vocab_size, "bytes": MIN_VOCAB_SIZE}.get(self.data.tokenizer, 0)
        if wanted > self.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: {self.model.vocab_size} is below the tokenizer's {wanted} "
                f"(data.tokenizer {self.data.tokenizer!r})"
            )

        self._check_objective()

    def _check_objective(self):
        """Which heads and families an objective is for."""
        name, model = self.objective.name, self.model
        heads = {
            "labels": ("sequence", "tokens"), "span": ("span",), "regression": ("sequence",),
            "distillation": ("lm", "sequence", "tokens"),
        }  # fmt: skip
        wanted = heads.get(name, ("lm", "mlm"))
        if model.head not in wanted:
            raise ValueError(
                f"model.head: {model.head!r} is not {' or '.join(wanted)}, as objective.name "
                f"{name!r} needs"
            )
        families = {
            "causal_lm": ("decoder",), "fill_in_the_middle": ("decoder",), "dpo": ("decoder",),
            "prefix_lm": ("decoder",), "permutation_lm": ("decoder", "encoder"),
            "masked_lm": ("encoder", "decoder"), "seq2seq": ("encoder_decoder", "decoder"),
            "span_corruption": ("encoder_decoder", "decoder"),
        }  # fmt: skip
        if model.head == "lm":
            families["distillation"] = ("decoder", "encoder_decoder")
        if model.family not in families.get(name, (model.family,)):
            raise ValueError(
                f"model.family: {model.family!r} is not {' or '.join(families[name])}, as "
                f"objective.name {name!r} needs"
            )
        if name == "prefix_lm" and not model.read_prompts_whole:
            raise ValueError(
                "model.read_prompts_whole: False is not what objective.name 'prefix_lm' trains; "
                "set it to True"
            )
        if name == "regression" and model.num_classes != 1:
            raise ValueError(
                f"model.num_classes: {model.num_classes} is not 1, as objective.name 'regression' "
                "needs"
            )
        weights = self.objective.class_weights
        if weights and len(weights) != model.num_classes:
            raise ValueError(
                f"objective.class_weights: {len(weights)} numbers for model.num_classes "
                f"{model.num_classes}"
            )
        self._check_metric()
        needs_tasks = name in ("labels", "span", "regression", "seq2seq", "dpo")
        # The rows of a corpus are for the next token alone.
        alone = (model.family, model.head) == ("decoder", "lm")
        needs_tasks = needs_tasks or (name == "distillation" and not alone)
        if needs_tasks and not self.tasks.names:
            raise ValueError(f"tasks.names: () is no task, which objective.name {name!r} needs")
        if self.tasks.names and self.data.train_tokens:
            raise ValueError(
                f"data.train_tokens: {self.data.train_tokens} is of text; examples of tasks are "
                "limited by tasks.limit"
            )

    def _check_metric(self):
        """Whether an evaluation has the split that train.metric names."""
        train = self.train
        known = self.tasks.names or ("validation",)
        if (train.keep_best or train.patience) and train.metric.rpartition("/")[0] not in known:
            raise ValueError(
                f"train.metric: {train.metric!r} is not measured; it begins with one of "
                + ", ".join(f"{name}/" for name in known)
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON values."""
        return dataclasses.asdict(self)


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Builds a RunConfig from nested mappings (a config file, a config.json).

    Raises:
      ValueError: An unknown key (with the nearest known one), a missing one, a wrong type, or a
        value that the dataclasses refuse; the message names the field and the value.
    """
    return _build(RunConfig, "", values)


def fields(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every leaf of the config by its dotted name."""
    flat = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            flat |= fields(field.type, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = field.type
    return flat


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by their dotted names."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def parse_value(name: str, text: str) -> Any:
    """A value from the command line, read as the type of the field.

    Raises:
      ValueError: No such field (with the nearest one), or a text that its type does not admit.
    """
    known = fields()
    if name not in known:
        raise ValueError(_unknown_key(name, list(known)))
    wanted = known[name]
    if wanted is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if typing.get_origin(wanted) is tuple and not isinstance(value, list | tuple):
        value = (value,)
    return _convert(wanted, name, value)


def _build(cls: type, prefix: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')}: {values!r} is not a section of the config")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(_unknown_key(prefix + name, [prefix + other for other in known]))
    arguments = {}
    for name, field in known.items():
        if name in values:
            arguments[name] = _convert(field.type, prefix + name, values[name])
        elif dataclasses.is_dataclass(field.type):
            arguments[name] = _build(field.type, f"{prefix}{name}.", {})
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name}: missing from the config")
    return cls(**arguments)


def _unknown_key(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{key}: no such key; the nearest is {nearest[0]}"


def _convert(annotation: Any, name: str, value: Any) -> Any:
    """Checks a value against a field's type; ints pass as floats, lists as tuples."""
    if dataclasses.is_dataclass(annotation):
        return _build(annotation, f"{name}.", value)
    if typing.get_origin(annotation) is tuple:
        kind = typing.get_args(annotation)[0]
        if isinstance(value, list | tuple):
            return tuple(_convert(kind, name, item) for item in value)
    elif annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int for Python, but not for a person.
    elif isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    raise ValueError(f"{name}: {value!r} is not of type {wanted}")
