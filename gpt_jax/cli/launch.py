"""Runs a config, or a sweep, on Cloud TPU from here; writes jobs for GKE and SLURM.

gpt-jax launch up --name=a --config=configs/gpt.py:size=124m --workdir=gs://my-bucket/runs/a \\
  --topology=v5e-16 --zone=us-west4-a --project=my-project --spot --dry_run
gpt-jax launch status --name=a        also: logs, stop     (docs/launch.md)

The code is shipped by commit. Nothing is left running when the job has ended or cannot start.
"""

import argparse
import pathlib

# Option -> (value, default, what it is); with no value it is a switch, a number by its default.
_NAMED = {"name": ("NAME", None, "of the launch"), "records": ("DIR", "", "runs/launches")}
_UP = {
    "name": ("NAME", None, "of the launch"),
    "config": ("FILE[:args]", None, "a config file of the repository"),
    "workdir": ("gs://...", None, "the run, or the folder of the sweep's runs"),
    "target": ("KIND", "tpu", "tpu (TPU VMs), gke or slurm (files for them are written)"),
    "topology": ("SLICE", "", "v4-8, v5e-16, v5p-128, v6e-64 ..."),
    "slices": ("N", 1, "joined by the data-centre network"),
    "zone": ("ZONE", "", "of the slices"),
    "project": ("ID", "", "of Google Cloud"),
    "spot": ("", False, "cheaper, may be taken away; then it is asked for again"),
    "reserved": ("", False, "out of a reservation"),
    "sweep": ("NAME", "", "FILE has sweep_NAME(); its runs, one after another"),
    "secret": ("VARIABLE", [], "an environment variable for the hosts; may be repeated"),
    "price": ("X", 0.0, "of a chip for an hour"),
    "max_cost": ("X", 0.0, "at which the run saves and all is deleted"),
    "max_wait": ("HOURS", 0.0, "in the queue"),
    "allow_dirty": ("", False, "ship what is not committed, too"),
    "keep": ("", False, "delete nothing at the end: it goes on to cost"),
    "dry_run": ("", False, "print what would be done, do nothing"),
    "poll": ("SECONDS", 15.0, "between looks"),
    "records": ("DIR", "", "what is known of launches (default: runs/launches)"),
    "out": ("DIR", "runs/launches", "gke, slurm: where files are written"),
    "image": ("IMAGE", "python:3.12", "gke: with bash and git"),
    "nodes": ("N", 1, "slurm"),
    "gpus_per_node": ("N", 8, "slurm; 0: CPUs"),
}
_LOGS = _NAMED | {
    "worker": ("N", 0, "which host of the first slice"),
    "follow": ("", False, "until the job has ended"),
    "poll": ("SECONDS", 15.0, "between looks"),
}
_STOP = _NAMED | {"poll": ("SECONDS", 15.0, "between tries")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="launch_command", required=True, metavar="COMMAND")
    for name, options, words in (
        ("up", _UP, "start a job, or follow one that runs"),
        ("status", _NAMED, "slices, last row, costs"),
        ("logs", _LOGS, "what a host has printed"),
        ("stop", _STOP, "let it save, and delete the slices"),
    ):
        command = commands.add_parser(name, help=words)
        for option, (value, default, about) in options.items():
            if not value:
                command.add_argument(f"--{option}", action="store_true", help=about)
                continue
            many = isinstance(default, list)
            command.add_argument(
                f"--{option}", metavar=value, help=about, default=default,
                required=default is None, action="append" if many else "store",
                type=str if many or default is None else type(default),
            )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.launch import commands
    from gpt_jax.launch.record import FOLDER

    folder = pathlib.Path(arguments.records or FOLDER)
    given = vars(arguments)
    if arguments.launch_command == "up":
        return commands.up(given, overrides, folder)
    function = getattr(commands, arguments.launch_command)  # logs, status, stop
    names = ("name", "worker", "follow", "poll")
    return function(folder, **{name: given[name] for name in names if name in given})
