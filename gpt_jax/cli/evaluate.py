"""Scores a run.

  gpt-jax evaluate --run=runs/quickstart --tasks=validation,compression
  gpt-jax evaluate --run=runs/sentiment --tasks=sentiment_en --split=test

validation:  the objective's means (loss, accuracy, bits per byte of text) on whole held-out splits
compression: bits per byte of zlib and lzma on the same texts
python_lines: the next line of functions in held-out Python: how likely the true one is, how many
             sampled ones parse
a task:      its scores on a split

What is printed of python_lines and tasks is added to the run's evaluations.jsonl.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    parser.add_argument("--step", type=int, help="checkpoint (default: the best kept, or newest)")
    parser.add_argument("--tasks", default="validation", help="names with commas between them")
    parser.add_argument("--split", default="test", help="of tasks: validation or test")
    parser.add_argument(
        "--limit", type=int, default=0, help="examples (default: all, or a fixed number)"
    )
    parser.add_argument("--num_shots", type=int, default=0, help="examples in a task's prompt")
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run programs that the model writes"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.runs.run import read_config
    from gpt_jax.tasks.table import find_task

    for name in ("limit", "num_shots"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name}: {getattr(arguments, name)} is not at least 0")
    config = read_config(arguments.run)
    names = arguments.tasks.split(",")
    for name in names:
        if name not in ("validation", "compression", "python_lines"):
            find_task(name)  # whether there is one

    from gpt_jax.evals import run_evaluation
    from gpt_jax.parallel.cache_folder import cache_dir
    from gpt_jax.parallel.startup import start

    start()
    for name in names:
        if name == "validation":
            results = run_evaluation.validation(arguments.run, arguments.step, cache_dir())
        elif name == "compression":
            results = run_evaluation.compression(config, cache_dir())
        elif name == "python_lines":
            results = run_evaluation.python_lines(
                arguments.run, arguments.step, cache_dir(), limit=arguments.limit
            )
        else:
            results = run_evaluation.task(
                arguments.run, arguments.step, cache_dir(), name, arguments.split,
                limit=arguments.limit, num_shots=arguments.num_shots,
                allow_code_execution=arguments.allow_code_execution,
            )  # fmt: skip
        for figure, value in results.items():
            shown = f"{value:.4f}" if isinstance(value, int | float) else value
            print(f"{name}/{figure:<16} {shown}")
    return 0
