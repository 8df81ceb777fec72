"""Prompts with solved examples before the question (arXiv:2005.14165)."""

from collections.abc import Sequence

import numpy as np

from gpt_jax.data.hashing import unit_hash
from gpt_jax.tasks.contract import Formatted, Task


def few_shot(
    task: Task,
    examples: Sequence[dict],
    formatted: Formatted,
    k: int,
    seed: int = 0,
    separator: str | None = None,
) -> str:
    """The prompt of one example behind k others with their answers.

    The others are drawn for each prompt anew, by the seed and the prompt alone.

    Args:
      task: Whose format the examples have.
      examples: What is drawn from: rows of the training split.
      formatted: The example that is asked; one with its prompt is never drawn.
      k: How many.
      seed: Another one draws others.
      separator: Between two examples; None: the task's.

    Raises:
      ValueError: there are not k other examples.
    """
    separator = task.separator if separator is None else separator
    key = int(unit_hash(f"{seed}/{formatted.prompt}") * 2**53)
    shots: list[str] = []
    # A permutation bit by bit: a split may have millions of rows, and k are wanted.
    for i in _draws(np.random.default_rng(key), len(examples), k):
        if len(shots) == k:
            break
        shot = task.format(examples[i])
        if shot.prompt != formatted.prompt:
            shots.append(shot.prompt + shot.target)
    if len(shots) < k:
        raise ValueError(
            f"num_shots: {k} is more than the {len(shots)} other examples of task {task.name!r}"
        )
    return separator.join([*shots, formatted.prompt])


def _draws(generator: np.random.Generator, size: int, k: int):
    """Numbers below size, each at most once: first some that are drawn, then, in need, the rest."""
    drawn: dict[int, None] = {}
    for _ in range(4 * k):
        if size and (i := int(generator.integers(size))) not in drawn:
            drawn[i] = None
            yield i
    yield from (int(i) for i in generator.permutation(size) if int(i) not in drawn)
