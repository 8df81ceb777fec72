"""What a run measures of itself while it trains: held-out rows, its tasks, samples of text."""

import json
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from gpt_jax.data.pipeline import PreparedData
from gpt_jax.evals.samples import Samples
from gpt_jax.evals.task_evaluation import evaluate_task
from gpt_jax.evals.validation import Validation, bytes_by_token
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.objectives import Objective
from gpt_jax.runs.config import RunConfig
from gpt_jax.tasks.table import find_task
from gpt_jax.types import Tree


class Evaluations:
    """All of them, in one call.

    Args:
      config: The run's.
      model: Its model.
      objective: What is measured on held-out rows.
      data: Whose rows.
      mesh: Where it runs.
      teacher: For objectives that compare with one.
      cache_dir: Where the tasks' data is.
      samples_path: The run's samples.jsonl; None: another process writes it.
      resume_step: The step the run goes on from; None: it begins.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Transformer,
        objective: Objective,
        data: PreparedData,
        mesh: Mesh,
        teacher: tuple[Transformer, Tree] | None,
        cache_dir: epath.PathLike,
        samples_path: epath.PathLike | None,
        resume_step: int | None,
    ):
        self._config, self._model, self._data = config, model, data
        self._cache_dir = cache_dir
        self._validations = {
            name: Validation(
                model, objective, rows, text_bytes(config, data, rows),
                config.train.microbatch_size, mesh, config.train.eval_batches, teacher,
            )
            for name, rows in data.validation.items()
        }  # fmt: skip
        tasks = {name: find_task(name) for name in config.tasks.names}
        self._tasks = {name: task for name, task in tasks.items() if task.score}
        self._samples = None
        if model.config.family == "decoder" and model.config.head == "lm":
            self._samples = Samples(samples_path, resume_step, model, data.tokenizer, config)

    def run(self, step: int, params: Tree, *, whole: bool) -> tuple[dict[str, Any], list[str]]:
        """Metrics by name, and lines for people.

        Args:
          step: Steps done.
          params: All parameters.
          whole: Over whole splits, not the shares that the config gives.
        """
        row, lines = {}, []
        for name, validation in self._validations.items():
            result = validation.run(params, whole=whole)
            if name in self._tasks:
                limit = 0 if whole else self._config.tasks.eval_examples
                result |= self._score(self._tasks[name], params, limit)
            row |= {f"eval/{name}/{metric}": value for metric, value in result.items()}
            lines.append(f"step {step}  {name}: {_figures(result)}")
        for prompt, text in self._samples.run(step, params) if self._samples else ():
            shown = json.dumps(prompt + text, ensure_ascii=False)
            lines.append(f"  sample: {shown[:160]}")
        return row, lines

    def _score(self, task: Any, params: Tree, limit: int) -> dict[str, float]:
        config = self._config
        return evaluate_task(
            self._model, params, self._data.tokenizer, task, "validation", self._cache_dir,
            seq_len=config.data.seq_len,
            source_len=config.tasks.source_len or config.data.seq_len,
            limit=limit, max_tokens=config.tasks.max_new_tokens,
            batch_size=config.train.microbatch_size,
        )  # fmt: skip

    def close(self) -> None:
        if self._samples:
            self._samples.close()


def text_bytes(config: RunConfig, data: PreparedData, rows: Any) -> np.ndarray | None:
    """See bytes_by_token; None where the targets are not the text of the corpus itself."""
    if config.tasks.names or config.objective.name not in ("causal_lm", "distillation"):
        return None
    return bytes_by_token(data.tokenizer, rows)


def _figures(result: dict[str, float]) -> str:
    names = {"bits_per_byte": "bits/byte"}
    return "  ".join(
        f"{names.get(name, name)} {value:.2f}" if name == "perplexity"
        else f"{names.get(name, name)} {value:.4f}"
        for name, value in result.items()
        if isinstance(value, int | float)
    )  # fmt: skip
