"""Fits laws to the runs of a ledger; predicts a run before it is trained; scores the prediction.

gpt-jax scaling fit --ledger=ladder.jsonl
gpt-jax scaling predict --ledger=ladder.jsonl --config=FILE[:args] --workdir=runs/held_out
gpt-jax train --config=FILE[:args] --workdir=runs/held_out
gpt-jax scaling score --run=runs/held_out     (docs/predictions.md)
"""

import argparse
import os
import pathlib

_FIT_OR_PREDICT = {
    "--ledger": ("FILE", None, "rows of a sweep"),
    "--params": ("COUNT", "num_params", "what N is, or num_params_non_embedding"),
    "--min_tokens": ("NUMBER", 0, "leave out runs that saw fewer"),
}
_FIT = _FIT_OR_PREDICT | {
    "--law": ("NAME,..", "param_data,compute", "also param_data_huber"),
    "--out": ("FILE", "", "write the laws there too, as JSON"),
}
_PREDICT = _FIT_OR_PREDICT | {
    "--config": ("FILE[:args]", None, "of the run"),
    "--workdir": ("DIR", None, "where the run will lie"),
    "--measures": ("NAME,..", "", "evaluations to predict too"),
}
_SCORE = {"--run": ("DIR", None, "a run directory")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="scaling_command", required=True, metavar="COMMAND")
    for name, options, words in (
        ("fit", _FIT, "laws with their intervals, and who is left out"),
        ("predict", _PREDICT, "write prediction.json for a run to come"),
        ("score", _SCORE, "a finished run's prediction beside what came"),
    ):
        command = commands.add_parser(name, help=words)
        for option, (value, default, about) in options.items():
            command.add_argument(
                option, metavar=value, help=about, default=default, required=default is None,
                type=int if default == 0 else str,
            )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.cli.flags import named_as_typed
    from gpt_jax.scaling import commands

    with named_as_typed(arguments):
        if arguments.scaling_command == "score":
            print("\n".join(commands.score(arguments.run)))
            return 0
        how = {"params": arguments.params, "min_tokens": arguments.min_tokens}
        if arguments.scaling_command == "fit":
            lines = commands.fit(arguments.ledger, _names(arguments.law), arguments.out, **how)
        else:
            workdir = pathlib.Path(arguments.workdir).absolute()
            config = _config(arguments.config, overrides, workdir)
            how["measures"] = _names(arguments.measures)
            lines = commands.predict(config, arguments.ledger, workdir, **how)
    print("\n".join(lines))
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _config(spec: str, overrides: list[str], workdir: pathlib.Path):
    """The config as `train` resolves it."""
    from gpt_jax.convert.source import inherit_model
    from gpt_jax.runs.config import run_config
    from gpt_jax.runs.config_file import load_config

    values = inherit_model(load_config(spec, overrides)[0], workdir)
    for name in ("path", "validation_path"):
        if values.get("data", {}).get(name):
            values["data"][name] = os.path.abspath(os.path.expanduser(values["data"][name]))
    return run_config(values)
