"""What a task is: data, what is asked of one example, and how answers are scored.

A new family is one file that makes `Task`s, and a line in `table.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.tasks.data_spec import DataSpec, Examples

# Names and values; values are numbers, but for signatures of libraries under "..._signature".
Scores = dict[str, float | str]
HEADS = ("lm", "sequence", "tokens", "span")


@dataclasses.dataclass(frozen=True)
class Formatted:
    """One example as a model is asked it; what a family does not use stays empty.

    Attributes:
      prompt: What a language model reads. It ends without white space.
      target: What it should write, with the white space that joins it to the prompt; for a span
        the characters of `pair` that answer.
      choices: Where the answer is one of several texts, all of them, written as the target.
      label: The class, or the number of a regression.
      text: What an encoder reads; "": the prompt.
      pair: A second text behind it: the other sentence, or what a question is about.
      answer_start: The character of `pair` at which the target begins; -1: there is no answer.
      words, word_labels: Words of a sentence and the class of each.
      joiner: What stands between two words.
      references: All texts that are right; (): the target alone.
      keep_end: Of a source too long for an encoder the end stays, not the start.
      open_end: The answer is a piece of a text that goes on. A decoder, which reads on from the
        prompt, does not learn that it ends there: the end of the prompt may look the same.
      tests: A program's tests, to run behind prompt and answer.
    """

    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    label: int | float | None = None
    text: str = ""
    pair: str = ""
    answer_start: int = -1
    words: tuple[str, ...] = ()
    word_labels: tuple[int, ...] = ()
    joiner: str = " "
    references: tuple[str, ...] = ()
    keep_end: bool = False
    open_end: bool = False
    tests: str = ""

    def __post_init__(self):
        start = self.answer_start
        there = self.pair[start : start + len(self.target)] if start >= 0 else self.target
        if there != self.target or start >= len(self.pair) > 0:
            raise ValueError(
                f"answer_start: at character {start} of the text stands {there!r}, not "
                f"{self.target!r}"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: As in the table.
      data: Where its examples are.
      format: From an example (one row, a dict) to what is asked; a ValueError of it begins with
        the field.
      encode: For a family whose examples are no `Formatted`, in the place of format and score:
        (row, tokenizer, chat template, seq_len, where) -> record, or None if it is too long.
      packs: Whether several of its records may share a row.
      score: (predictions, formatted) -> numbers. A prediction is what the model's head gives: the
        number of a class ("sequence", and "lm" where there are choices) or the value of a
        regression, the class of each word ("tokens"), else text ("lm", "span").
      metric: The name of the main one.
      heads: What models can do it.
      labels: Names of the classes; (): no classes.
      is_share: The main metric is a share of the examples.
      max_tokens: Most tokens of an answer.
      stop: Texts that end an answer.
      separator: What stands between the examples of a prompt.
      answer_cue: The prompt for the likelihood of a choice as such.
      program: (formatted, answer) -> a program that fails unless the answer is right.
    """

    name: str
    data: DataSpec
    format: Callable[[dict], Formatted] | None = None
    score: Callable[[Sequence[Any], Sequence[Formatted]], Scores] | None = None
    metric: str = "loss"
    encode: Callable[..., Any] | None = None
    packs: bool = True
    heads: tuple[str, ...] = ("lm",)
    labels: tuple[str, ...] = ()
    is_share: bool = False
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    separator: str = "\n\n"
    answer_cue: str = "Answer:"
    program: Callable[[Formatted, str], str] | None = None

    def examples(self, split: str, cache_dir, limit: int = 0) -> Examples:
        """The rows of a split; see DataSpec.examples.

        Raises:
          ValueError: the data are not here; the text says what fetches them.
        """
        try:
            return self.data.examples(split, cache_dir, limit)
        except ValueError as error:
            raise ValueError(f"tasks.{self.name}: {error}") from None

    def formatted(self, split: str, cache_dir, limit: int = 0) -> list[Formatted]:
        """The examples of a split as they are asked; `limit` as in DataSpec.examples.

        Raises:
          ValueError: a row is not what the task needs; the text names it and the field.
        """
        examples = self.examples(split, cache_dir, limit)
        return [self._format(examples, i) for i in range(len(examples))]

    def _format(self, examples: Examples, i: int) -> Formatted:
        try:
            row = examples[i]
        except ValueError as error:  # it names the row
            raise ValueError(f"tasks.{self.name}: {error}") from None
        try:
            return self.format(row)
        except ValueError as error:
            raise ValueError(f"tasks.{self.name}: {examples.name(i)}: {error}") from None

    def with_data(self, name: str) -> "Task":
        """The same task on other data that have its own fields and labels."""
        return dataclasses.replace(self, data=DataSpec(name))

    def check_model(self, head: str, num_classes: int = 0) -> None:
        """Raises ValueError if a model with this head cannot do the task."""
        if head not in self.heads:
            raise ValueError(
                f"model.head: {head!r} does not do task {self.name!r}; it needs one of "
                f"{', '.join(self.heads)}"
            )
        wanted = max(1, len(self.labels))
        if head in ("sequence", "tokens") and num_classes != wanted:
            raise ValueError(
                f"model.num_classes: {num_classes} is not {wanted}, the classes of task "
                f"{self.name!r}"
            )


def text_field(row: Mapping, field: str) -> str:
    """A field that holds text, or a ValueError that names it."""
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    what = "is not there" if field not in row else f"{value!r} is no text"
    raise ValueError(f"{field}: {what}; the row has {', '.join(row) or 'nothing'}")


def class_id(labels: Sequence[str], value: Any, field: str) -> int:
    """The number of a class, or a ValueError that names field, value and classes."""
    if value not in labels:
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(labels)}")
    return labels.index(value)
