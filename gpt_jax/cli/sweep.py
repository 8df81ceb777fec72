"""Trains the runs of a sweep: what is missing, and what broke; what is done is left alone.

  gpt-jax sweep --config=experiments/predictable_scaling/config.py --sweep=ladder \\
    --workdir=runs/ladder --dry_run

A config file defines a sweep as sweep_<name>(), which yields {"model.embed_dim": 64, ...} each:
docs/sweeps.md. Runs lie in the folder of the sweep, beside their logs and ledger.jsonl.
"""

import argparse
import functools
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")
    parser.add_argument("--sweep", required=True, metavar="NAME", help="FILE has sweep_NAME()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of its runs")
    parser.add_argument("--dry_run", action="store_true", help="print the runs, start nothing")
    parser.add_argument("--status", action="store_true", help="print how far it is")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--ledger", metavar="FILE", help="write the ledger there too")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.launch import local, standing
    from gpt_jax.launch.sweeps import plan_sweep

    if "://" in arguments.workdir:
        raise ValueError(f"--workdir: {arguments.workdir!r} is not a folder of this machine")
    workdir = pathlib.Path(arguments.workdir).absolute()
    runs = plan_sweep(arguments.config, arguments.sweep, workdir, overrides)
    if arguments.processes < 1:
        raise ValueError(f"--processes: {arguments.processes} is not at least 1")
    for asked, show in ((arguments.dry_run, standing.table), (arguments.status, standing.status)):
        if asked:
            print("\n".join(show(runs, workdir, arguments.processes)))
            return 0
    return local.run_sweep(
        runs,
        workdir,
        processes=arguments.processes,
        ledger=pathlib.Path(arguments.ledger) if arguments.ledger else None,
        say=functools.partial(print, flush=True),
    )
