"""Trains by a config, or continues when the work directory holds a run.

  gpt-jax train --config=configs/gpt.py:size=1m --config.data.path=FOLDER_OF_TEXTS

Any value of the config is changed by --config.SECTION.NAME=VALUE; `gpt-jax config` prints them.

On several hosts each runs the same command, with --distributed=auto where the cluster says who is
there, or with --coordinator, --num_processes and its own --process_id (docs/multihost.md).
"""

import argparse
import functools
import os
import pathlib
import sys

from gpt_jax.cli import processes as _processes
from gpt_jax.train.interrupts import leaving_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")
    parser.add_argument("--workdir", help="the run directory (default: runs/<name of the config>)")
    parser.add_argument(
        "--supervise", action="store_true",
        help="start it again when it crashes, until it is done; with --num_processes alone it "
        "starts all of them here",
    )  # fmt: skip
    _processes.add_arguments(parser)


@leaving_on_sigterm()
def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.runs.events import Phases

    phases = Phases()
    from gpt_jax.convert.source import inherit_model
    from gpt_jax.data.corpora import CORPORA, corpus_folder
    from gpt_jax.data.sources import find_files
    from gpt_jax.parallel.cache_folder import cache_dir
    from gpt_jax.runs.config import run_config
    from gpt_jax.runs.config_file import load_config

    if "://" in (arguments.workdir or ""):
        raise ValueError(f"--workdir: {arguments.workdir!r} is not a folder of this machine")
    workdir = pathlib.Path(arguments.workdir or _default_workdir(arguments.config)).absolute()
    processes = _processes.given(arguments)
    if arguments.supervise:
        from gpt_jax.launch.supervisor import supervise

        words = [f"--config={arguments.config}", f"--workdir={workdir}"]
        words += [f"--config.{override}" for override in overrides]
        command = [sys.executable, "-m", "gpt_jax", "train", *words]
        say = functools.partial(print, flush=True)
        return supervise(command, workdir, processes=processes, say=say)
    values, _ = load_config(arguments.config, overrides)
    values = inherit_model(values, workdir)
    for name in ("path", "validation_path"):  # a run is read from other folders too
        if values.get("data", {}).get(name):
            values["data"][name] = os.path.abspath(os.path.expanduser(values["data"][name]))
    config = run_config(values)
    if config.data.path:
        find_files(config.data.path, config.data.pattern)  # whether there is anything to read
    elif not config.tasks.names:
        for name in config.data.name.split("+"):
            if name in CORPORA:
                corpus_folder(name, cache_dir())  # whether it is fetched

    processes.check_complete()

    # JAX starts here: what can be known without it has been refused by now.
    from gpt_jax.parallel.startup import start
    from gpt_jax.train.loop import fit
    from gpt_jax.train.setup import set_up

    start()
    with _processes.one_of(processes) as is_first:
        if is_first:
            print(f"run:   {workdir}\ncache: {cache_dir()} (GPT_JAX_CACHE moves it)", flush=True)
        training = set_up(config, workdir, cache_dir(), phases=phases)
        if is_first:
            print(training.summary(), flush=True)
        return fit(training)


def _default_workdir(spec: str) -> str:
    path, _, argument = spec.partition(":")
    words = [pathlib.Path(path).stem, *argument.replace("=", "").split(",")]
    return "runs/" + "-".join(word for word in words if word)
