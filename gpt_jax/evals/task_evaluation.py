"""Scores of a model on a task: by its head, by the likelihood of choices, or by what it writes.

B batch, T length, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.text import Generator
from gpt_jax.evals.likelihood import NORMALIZATIONS, choice_scores
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.parallel import sharding
from gpt_jax.tasks import metrics
from gpt_jax.tasks.answers import read_outputs
from gpt_jax.tasks.contract import Formatted, Scores, Task
from gpt_jax.tasks.data_spec import Examples
from gpt_jax.tasks.encode import encode_inputs
from gpt_jax.tasks.few_shot import few_shot
from gpt_jax.tasks.sandbox import check_allowed, run_programs
from gpt_jax.types import Array, Tree


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What every way of asking needs; see evaluate_task."""

    model: Transformer
    params: Tree
    tokenizer: Tokenizer
    task: Task
    batch_size: int
    seq_len: int
    source_len: int
    sampling: SamplingParams


def evaluate_task(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    task: Task,
    split: str,
    cache_dir: os.PathLike | str,
    *,
    limit: int = 0,
    num_shots: int = 0,
    seed: int = 0,
    max_tokens: int = 0,
    batch_size: int = 16,
    seq_len: int = 0,
    source_len: int = 0,
    num_samples: int = 1,
    temperature: float = 0.0,
    allow_code_execution: bool = False,
) -> Scores:
    """The task's scores on a split.

    A head of classes is read; with head "lm" the most likely choice counts where there are choices,
    and otherwise what is generated.

    Args:
      model: Its head decides how it is asked.
      params: Its parameters, without Flax's boxes.
      tokenizer: Its tokenizer.
      task: What is asked.
      split: "train", "validation" or "test".
      cache_dir: Where the task's data are.
      limit: At most so many examples, evenly over the split; 0: all.
      num_shots: Solved examples of the training split in each prompt; as many as fit.
      seed: For drawing these, and for sampling.
      max_tokens: Most tokens of an answer; 0: the task's.
      batch_size: Examples at a time.
      seq_len, source_len: As the model was trained on the task; 0: the model's seq_len.
      num_samples: Answers for each example, for pass@k of programs.
      temperature: Of these; 0: the most likely token.
      allow_code_execution: Whether programs that the model writes may run, in the sandbox.

    Returns:
      The task's scores; standard error and 95 % interval of the main one (`..._stderr`, `..._low`,
      `..._high`); `num_examples`; for choices the accuracy by each normalisation; the mean
      `num_shots` that fitted; for programs that may run `pass@k`.

    Raises:
      ValueError: the model cannot do the task, or its data are not here.
    """
    config = model.config
    if task.score is None:
        raise ValueError(f"tasks.names: task {task.name!r} has no score beside its loss")
    task.check_model(config.head, config.num_classes)
    if num_shots and config.head != "lm":
        raise ValueError(f"num_shots: {num_shots} needs model.head 'lm', not {config.head!r}")
    if allow_code_execution and task.program:
        check_allowed(True)
    formatted = task.formatted(split, cache_dir, limit)
    if not formatted:
        raise ValueError(f"tasks.{task.name}: split {split!r} has no rows")
    seq_len = min(seq_len or config.seq_len, config.seq_len)
    sampling = SamplingParams(
        # An answer never takes more than half of the context from the prompt.
        max_tokens=min(max_tokens or task.max_tokens, max(1, seq_len // 2)),
        temperature=temperature,
        n=num_samples,
        stop=task.stop,
        seed=seed,
    )
    asked = _Asked(
        model, params, tokenizer, task, batch_size, seq_len, source_len or config.seq_len, sampling
    )
    questions, more = formatted, {}
    if num_shots:
        examples = task.examples("train", cache_dir)
        shown = [_with_shots(asked, examples, f, num_shots, seed) for f in formatted]
        questions, counts = zip(*shown, strict=True)
        more["num_shots"] = metrics.mean(counts)
    if config.head != "lm":
        predictions = _read_head(asked, formatted)
    elif formatted[0].choices:
        predictions, by_name = _choose(asked, questions)
        more |= by_name
    else:
        answers = _write(asked, questions)
        predictions = [texts[0] for texts in answers]
        if task.program and allow_code_execution:
            more |= _pass_rates(asked, formatted, answers)
    return {**_with_interval(task, predictions, formatted), **more, "num_examples": len(formatted)}


def _with_interval(task: Task, predictions: list, formatted: list[Formatted]) -> Scores:
    def rescore(numbers: Sequence[int]) -> Scores:
        return task.score([predictions[i] for i in numbers], [formatted[i] for i in numbers])

    scores = task.score(predictions, formatted)
    size = len(formatted)
    return {**scores, **metrics.interval(scores, task.metric, task.is_share, rescore, size)}


def _with_shots(
    asked: _Asked, examples: Examples, formatted: Formatted, k: int, seed: int
) -> tuple[Formatted, int]:
    """The example with k solved ones before it, or as many as leave place for the answer."""
    for shots in range(k, 0, -1):
        prompt = few_shot(asked.task, examples, formatted, shots, seed)
        if len(asked.tokenizer.encode(prompt)) <= _prompt_room(asked, formatted):
            return dataclasses.replace(formatted, prompt=prompt), shots
    return formatted, 0


def _prompt_room(asked: _Asked, formatted: Formatted) -> int:
    """Tokens of a prompt that leave place for the answer and one special token."""
    if asked.model.config.family == "encoder_decoder":
        return asked.source_len - 1
    longest = max((len(asked.tokenizer.encode(c)) for c in formatted.choices), default=0)
    return asked.seq_len - 1 - (longest or asked.sampling.max_tokens)


def _read_head(asked: _Asked, formatted: list[Formatted]) -> list[Any]:
    config, seq_len = asked.model.config, asked.seq_len
    records = [encode_inputs(f, asked.tokenizer, config, seq_len) for f in formatted]
    predictions: list[Any] = [None] * len(records)
    for numbers, batch in record_batches(records, asked.batch_size, most=config.seq_len):
        inputs = {name: batch[name] for name in batch if name not in ("targets", "loss_mask")}
        outputs = sharding.fetch(_outputs(asked.params, inputs, model=asked.model))
        for row, number in enumerate(numbers):
            own = outputs[row]
            if config.head != "sequence":
                own = own[: len(records[number]["tokens"])]
            predictions[number] = read_outputs(
                config.head, own, formatted[number], asked.tokenizer, seq_len
            )
    return predictions


@functools.partial(jax.jit, static_argnames=("model",))
def _outputs(params: Tree, batch: dict, *, model: Transformer) -> Array:
    return forward(model, params, batch)


def _choose(asked: _Asked, formatted: list[Formatted]) -> tuple[list[int], Scores]:
    """The most likely choice by its sum, and the accuracy by each normalisation."""
    scores = choice_scores(
        asked.model, asked.params, asked.tokenizer, formatted, asked.task.answer_cue,
        batch_size=asked.batch_size, seq_len=asked.seq_len, source_len=asked.source_len,
    )  # fmt: skip
    true = np.array([f.label for f in formatted])
    chosen = {name: np.array([row.argmax() for row in scores[name]]) for name in NORMALIZATIONS}
    more = {f"accuracy_by_{name}": metrics.accuracy(chosen[name], true) for name in NORMALIZATIONS}
    return chosen["sum"].tolist(), more


def _write(asked: _Asked, formatted: list[Formatted]) -> list[list[str]]:
    """num_samples answers for each example."""
    generator = Generator(asked.model, asked.params, asked.tokenizer)
    prompts = [_fit(asked, f) for f in formatted]
    # The longest first: the cache never grows, and at the end only short ones are left.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[str]] = [[] for _ in prompts]
    done = generator.complete([prompts[i] for i in order], asked.sampling)
    for row, completion in enumerate(done):
        answers[order[row // asked.sampling.n]].append(completion.text)
    return answers


def _fit(asked: _Asked, formatted: Formatted) -> str:
    """The prompt, cut like the prompts of training; its text, as the generator takes text."""
    room, prompt = _prompt_room(asked, formatted), formatted.prompt
    at_start = formatted.keep_end or asked.model.config.family != "encoder_decoder"
    ids, offsets = asked.tokenizer.encode_with_offsets(prompt)
    if len(ids) <= room:
        return prompt
    prompt = prompt[offsets[len(ids) - room][0] :] if at_start else prompt[: offsets[room][0]]
    while len(asked.tokenizer.encode(prompt)) > room:  # cut in two, a word may take more tokens
        prompt = prompt[1:] if at_start else prompt[:-1]
    return prompt


def _pass_rates(asked: _Asked, formatted: list[Formatted], answers: list[list[str]]) -> Scores:
    """pass@k of the programs for k of 1, 10 and 100 up to the number of samples."""
    programs = [
        asked.task.program(f, answer)
        for f, own in zip(formatted, answers, strict=True)
        for answer in own
    ]
    passed = [outcome.passed for outcome in run_programs(programs, allow_code_execution=True)]
    n = asked.sampling.n
    right = np.reshape(passed, (len(formatted), n)).sum(1)
    rates = {
        f"pass@{k}": metrics.mean(metrics.pass_at_k(n, int(c), k) for c in right)
        for k in (1, 10, 100)
        if k <= n
    }
    if n == 1:
        rates |= metrics.interval(rates, "pass@1", True, None, len(formatted))
    return rates
