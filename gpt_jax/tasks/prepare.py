"""From the names of tasks to the rows that a run trains on and is judged by."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.data.config import DataConfig
from gpt_jax.data.examples import ExampleRows, Layout, Record
from gpt_jax.data.hashing import digest
from gpt_jax.data.mixture import Mixture, mixture_weights
from gpt_jax.data.pipeline import PreparedData, given_tokenizer, prepared, trained_tokenizer
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.tasks.config import TasksConfig
from gpt_jax.tasks.contract import Formatted, Task
from gpt_jax.tasks.encode import encode_all
from gpt_jax.tasks.table import find_task

_ROW_TARGETS = ("sequence", "span")


def prepare_tasks(
    config: TasksConfig,
    data: DataConfig,
    model: TransformerConfig,
    cache_dir,
    tokenizer: Tokenizer | None = None,
    workdir=None,
) -> PreparedData:
    """Reads, formats and encodes the examples of all tasks.

    Args:
      config: The tasks and their weights.
      data: Tokenizer and row length.
      model: Whose family and head decide what an example becomes.
      cache_dir: Where the tasks' data is.
      tokenizer: The one a run already keeps; `data.tokenizer` is then not looked at.
      workdir: The directory of such a run, which also has its chat template.

    Raises:
      ValueError: A task is not known, not for this model, or its data is not here; a row is not
        what the task needs, or nothing of a split fits the row length.
    """
    # By the config's name: two tasks of one's own data may be of one family.
    named = {name: find_task(name) for name in config.names}
    tasks = list(named.values())
    for task in tasks:
        task.check_model(model.head, model.num_classes)
    if tokenizer is None:
        tokenizer = given_tokenizer(data)
    if tokenizer is None:
        tokenizer = _trained(tasks, config, data, cache_dir)
    template = ChatTemplate.load(workdir) if workdir else _template(config, data)
    layout = task_layout(config, data, model)

    def rows(task: Task, split: str) -> ExampleRows:
        limit = config.limit if split == "train" else 0
        records, dropped = task_records(
            task, split, tokenizer, model, layout, cache_dir, template, limit
        )
        if dropped:
            print(
                f"warning: tasks.{task.name}: {dropped} examples of {split} are too long for "
                f"data.seq_len {data.seq_len} and are left out",
                file=sys.stderr,
            )
        if not records:
            raise ValueError(
                f"data.seq_len: {data.seq_len} is too short for every {split} example of task "
                f"{task.name!r}"
            )
        pack = config.pack and task.packs and not layout.row_targets
        return ExampleRows(records, layout, pack=pack)

    train = {name: rows(task, "train") for name, task in named.items()}
    held_out = {name: rows(task, "validation") for name, task in named.items()}
    weights = config.weights or mixture_weights(
        [len(part.records) for part in train.values()], config.temperature, config.cap
    )
    # Weights are of examples, while a mixture's places are rows, which hold several.
    per_row = [len(part) / len(part.records) for part in train.values()]
    weights = [weight * rows for weight, rows in zip(weights, per_row, strict=True)]
    result = prepared(data, " + ".join(train), tokenizer, Mixture(train, weights), held_out)
    has_turns = any(task.encode for task in tasks) and template.fits(tokenizer)
    return dataclasses.replace(result, template=template if has_turns else None)


def task_layout(config: TasksConfig, data: DataConfig, model: TransformerConfig) -> Layout:
    """The shape of the rows of tasks."""
    source_len = 0
    if model.family == "encoder_decoder":
        source_len = config.source_len or data.seq_len
    return Layout(data.seq_len, source_len, model.head in _ROW_TARGETS)


def task_records(
    task: Task,
    split: str,
    tokenizer: Tokenizer,
    model: TransformerConfig,
    layout: Layout,
    cache_dir,
    template: ChatTemplate,
    limit: int = 0,
) -> tuple[list[Record], int]:
    """The examples of a split as records, and how many were too long."""
    if task.encode is None:
        formatted = task.formatted(split, cache_dir, limit)
        return encode_all(task, formatted, tokenizer, model, layout.seq_len, layout.source_len)
    examples = task.examples(split, cache_dir, limit)
    encoded = [
        task.encode(row, tokenizer, template, layout.seq_len, f"tasks.{task.name}: {name}")
        for row, name in zip(examples, map(examples.name, range(len(examples))), strict=True)
    ]
    records = [record for record in encoded if record is not None]
    return records, len(encoded) - len(records)


def _template(config: TasksConfig, data: DataConfig) -> ChatTemplate:
    if config.template or data.tokenizer not in ("bpe", "bytes"):
        return ChatTemplate.load(config.template or data.tokenizer)
    return CHATML


def _trained(tasks: Sequence[Task], config: TasksConfig, data: DataConfig, cache_dir) -> Tokenizer:
    """A BPE of the training examples' prompts and targets."""
    formatted: list[Formatted] = []
    for task in tasks:
        if task.format is None:
            raise ValueError(
                f"data.tokenizer: {data.tokenizer!r} is not trained on conversations; give a run, "
                "a tokenizer.json or 'bytes'"
            )
        formatted += task.formatted("train", cache_dir, config.limit)
    fingerprint = digest("tasks", [dataclasses.astuple(f)[:2] for f in formatted])

    def texts() -> Iterator[str]:
        for example in formatted:
            yield f"{example.prompt}{example.target}\n"

    label = " + ".join(task.name for task in tasks)
    return trained_tokenizer(texts(), fingerprint, label, data, cache_dir)
