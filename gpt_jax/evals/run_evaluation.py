"""Evaluations of a finished run, from its directory alone."""

import json
from typing import Any

from etils import epath

from gpt_jax.data.compression import compression_bits_per_byte
from gpt_jax.data.documents import VALIDATION
from gpt_jax.data.sources import open_source
from gpt_jax.evals.during_training import text_bytes
from gpt_jax.evals.python_lines import NUM_PROMPTS, score_python_lines
from gpt_jax.evals.task_evaluation import evaluate_task
from gpt_jax.evals.validation import Validation
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.data import prepare_run
from gpt_jax.runs.run import EVALUATIONS, open_run
from gpt_jax.tasks.python_lines import line_prompts
from gpt_jax.tasks.table import find_task


def validation(
    workdir: epath.PathLike, step: int | None, cache_dir: epath.PathLike
) -> dict[str, float]:
    """The objective's means over whole held-out splits; see Validation.run.

    With several splits (tasks) each name begins with that of its split.
    """
    run = open_run(workdir, step)
    if not run.data_fingerprints:
        raise ValueError(
            f"--tasks: 'validation': {str(workdir)!r} was not trained here; name a task"
        )
    data = prepare_run(run.config, cache_dir, run.tokenizer, run.workdir)
    data.check_fingerprints(run.data_fingerprints)
    mesh = make_mesh(MeshConfig())
    # Whole rows for every device, however many there are here.
    batch_size = -(-run.config.train.microbatch_size // mesh.size) * mesh.size
    objective = make_objective(run.config.objective, training=False)
    if objective.needs_teacher:
        name = run.config.objective.name
        raise ValueError(f"--tasks: 'validation' of {name!r} is measured in training only")
    results = {}
    for name, rows in data.validation.items():
        token_bytes = text_bytes(run.config, data, rows)
        evaluator = Validation(run.model, objective, rows, token_bytes, batch_size, mesh)
        prefix = f"{name}/" if len(data.validation) > 1 else ""
        figures = evaluator.run(run.params, whole=True)
        results |= {prefix + figure: value for figure, value in figures.items()}
    return results


def task(
    workdir: epath.PathLike, step: int | None, cache_dir: epath.PathLike, name: str, split: str,
    *, limit: int = 0, num_shots: int = 0, allow_code_execution: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A task's scores, also added to the run's evaluations.jsonl; see evaluate_task."""
    run = open_run(workdir, step)
    config = run.config
    scores = evaluate_task(
        run.model, run.params, run.tokenizer, find_task(name), split, cache_dir,
        seq_len=config.data.seq_len,
        source_len=config.tasks.source_len or config.data.seq_len,
        limit=limit, num_shots=num_shots, seed=config.seed,
        max_tokens=config.tasks.max_new_tokens,
        batch_size=config.train.microbatch_size, allow_code_execution=allow_code_execution,
    )  # fmt: skip
    row = {"step": run.step, "task": name, "split": split, "num_shots": num_shots, **scores}
    _append(workdir, row)
    return scores


def python_lines(
    workdir: epath.PathLike, step: int | None, cache_dir: epath.PathLike, *, limit: int = 0
) -> dict[str, float]:
    """See score_python_lines; also added to the run's evaluations.jsonl.

    Raises:
      ValueError: The run's validation split holds no functions in Python.
    """
    run = open_run(workdir, step)
    if run.config.tasks.names:
        raise ValueError("--tasks: 'python_lines' is of a corpus, but the run was trained on tasks")
    documents = open_source(run.config.data, VALIDATION, cache_dir)
    prompts = line_prompts(documents, limit or NUM_PROMPTS, run.config.model.seq_len)
    if not prompts:
        raise ValueError(
            f"--tasks: 'python_lines': the validation split of {documents.label!r} holds no "
            "functions in Python that fit the model's context"
        )
    scores = score_python_lines(run.model, run.params, run.tokenizer, prompts)
    _append(workdir, {"step": run.step, "task": "python_lines", **scores})
    return scores


def compression(config: RunConfig, cache_dir: epath.PathLike) -> dict[str, float]:
    """Bits per byte of zlib and lzma on the texts of the validation split."""
    if config.tasks.names:
        raise ValueError("--tasks: 'compression' is of a corpus, but the run was trained on tasks")
    documents = open_source(config.data, VALIDATION, cache_dir)
    return compression_bits_per_byte(text for text in documents if text)


def _append(workdir: epath.PathLike, row: dict[str, Any]) -> None:
    with open(epath.Path(workdir) / EVALUATIONS, "a") as file:
        file.write(json.dumps(row) + "\n")
