"""Runs a run again from its config.json, and says whether it is the same, bit for bit.

  gpt-jax reproduce --run=runs/quickstart
  gpt-jax reproduce --run=runs/quickstart --steps=20 --workdir=runs/again

Compared are all rows of metrics.jsonl, but for times and speeds, and the digests of the leaves of
checkpoints that both have. Where they first differ is named, and what differs in code, packages,
devices, mesh, data and config. Exits with 1 if they differ.
"""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    parser.add_argument("--workdir", metavar="NEW", help="where (default: DIR-reproduced)")
    parser.add_argument("--steps", type=int, help="how far (default: as far as the run went)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    old = pathlib.Path(arguments.run).absolute()
    if not (old / "config.json").exists():
        raise ValueError(f"--run: {arguments.run!r} holds no run (no config.json in it)")
    new = pathlib.Path(arguments.workdir or f"{old}-reproduced").absolute()
    if new.exists():
        raise ValueError(f"--workdir: {str(new)!r} is there already; give a new folder")

    from gpt_jax.parallel.cache_folder import cache_dir
    from gpt_jax.parallel.startup import start
    from gpt_jax.train.reproduce import reproduce

    start()
    result = reproduce(old, new, cache_dir(), arguments.steps)
    for line in result.lines():
        print(line)
    return 0 if result.equal else 1
