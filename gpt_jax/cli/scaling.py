"""Fits laws to the runs of a ledger; predicts a run before it is trained; scores the prediction.

  gpt-jax scaling fit --ledger=ladder.jsonl
  gpt-jax scaling predict --ledger=ladder.jsonl --config=FILE[:args] --workdir=runs/held_out
  gpt-jax train --config=FILE[:args] --workdir=runs/held_out
  gpt-jax scaling score --run=runs/held_out

docs/predictions.md tells what a prediction holds, and what makes it one.
"""

import argparse
import os
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="scaling_command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="laws with their intervals, and who is left out")
    predict = commands.add_parser("predict", help="write prediction.json for a run to come")
    for command in (fit, predict):
        command.add_argument("--ledger", required=True, metavar="FILE", help="rows of a sweep")
        command.add_argument("--params", default="num_params", help="N: num_params or "
                             "num_params_non_embedding")  # fmt: skip
        command.add_argument("--min_tokens", type=int, default=0, metavar="N",
                             help="leave out runs that saw fewer tokens")  # fmt: skip
    fit.add_argument("--law", default="param_data,compute", help="param_data, compute, "
                     "param_data_huber, with commas between them")  # fmt: skip
    fit.add_argument("--out", metavar="FILE", help="write the laws there too, as JSON")
    predict.add_argument("--config", required=True, metavar="FILE[:args]", help="of the run")
    predict.add_argument("--workdir", required=True, metavar="DIR", help="where it will lie")
    predict.add_argument("--measures", default="", help="evaluations to predict too, with commas")
    score = commands.add_parser("score", help="a finished run's prediction beside what came")
    score.add_argument("--run", required=True, metavar="DIR", help="a run directory")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.cli.flags import named_as_typed

    if overrides and arguments.scaling_command != "predict":
        raise ValueError(f"--config.{overrides[0]}: only predict takes a config")
    chosen = {"fit": _fit, "predict": _predict, "score": _score}[arguments.scaling_command]
    with named_as_typed(arguments):
        return chosen(arguments, overrides)


def _fit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.runs.ledger import read_ledger
    from gpt_jax.scaling import wording

    names = [name for name in arguments.law.split(",") if name]
    lines, values = wording.fit(
        read_ledger(arguments.ledger), names, arguments.params, arguments.min_tokens
    )
    if arguments.out:
        wording.write_json(arguments.out, values)
    print("\n".join(lines))
    return 0


def _predict(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.scaling import predicting, prediction, wording

    workdir = pathlib.Path(arguments.workdir).absolute()
    made = predicting.make_prediction(
        _config(arguments.config, overrides, workdir),
        arguments.ledger,
        params=arguments.params,
        measures=[name for name in arguments.measures.split(",") if name],
        min_tokens=arguments.min_tokens,
        made_after_the_run=prediction.has_begun(workdir),
    )
    sha256 = prediction.write_prediction(workdir, made)
    print("\n".join(wording.prediction_lines(made)))
    print(f"sha256: {sha256}   {workdir / prediction.FILE}")
    return 0


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


def _score(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.scaling import prediction, wording

    print("\n".join(wording.score_lines(prediction.score(arguments.run))))
    return 0
