"""Scores a run.

  gpt-jax evaluate --run=runs/quickstart --tasks=validation,compression

validation:  loss, perplexity, accuracy, bits per byte on the whole validation split
compression: bits per byte of zlib and lzma on the same texts
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--tasks", default="validation", help="names with commas between them")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.runs.run import read_config

    config = read_config(arguments.run)
    tasks = arguments.tasks.split(",")
    known = ("validation", "compression")
    for task in tasks:
        if task not in known:
            raise ValueError(f"--tasks: {task!r} is not one of {', '.join(known)}")

    from gpt_jax.evals.run_evaluation import compression, validation
    from gpt_jax.parallel.startup import cache_dir, start

    start()
    for task in tasks:
        if task == "validation":
            results = validation(arguments.run, arguments.step, cache_dir())
        else:
            results = compression(config, cache_dir())
        for name, value in results.items():
            print(f"{task}/{name:<16} {value:.4f}")
    return 0
