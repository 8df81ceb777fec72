"""The program `gpt-jax`, also `python -m gpt_jax`: finds the command and words its failures."""

import argparse
import errno
import importlib
import os
import re
import sys
import traceback

# Command -> what it does; its module is imported only when it is called, so that help is instant.
_COMMANDS = {
    "config": "print what a config would run: values, parameters, FLOPs, bytes",
    "data": "fetch corpora and small pretrained models by name; look at rows",
    "train": "train, or continue a run",
    "sweep": "train the runs of a config's sweep: what is missing, what broke",
    "scaling": "fit laws to runs, predict a run before it is trained, score the prediction",
    "preflight": "does a config fit a TPU slice, what costs a step; do meshes agree",
    "launch": "run a config or a sweep on Cloud TPU; jobs for GKE and SLURM",
    "reproduce": "run a run again, and say whether it is the same bit for bit",
    "report": "one page about several runs",
    "evaluate": "score a run",
    "generate": "continue a text with a run",
    "serve": "answer OpenAI's clients over HTTP, with a page to try",
    "convert": "make a run of a pretrained model, or Hugging Face's files of a run",
}
_USER_MISTAKE = 2
# A path that is not there, not a folder, or not ours to write.
_USERS_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits: 0; 2 and one line for a user's mistake; 75 for a run that was
    interrupted and saved; 1 for the rest."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "commands:\n" + "\n".join(f"  {name:10} {does}" for name, does in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gpt-jax",
        description="GPT-style language models in JAX. `gpt-jax COMMAND --help` tells more.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(f"gpt_jax.cli.{name}")
    command_parser = argparse.ArgumentParser(
        prog=f"gpt-jax {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(command_parser)
    try:
        sys.exit(command.run(*_parse(command_parser, argv[1:])))
    except (Exception, KeyboardInterrupt) as error:
        code = tell(error)
        if code is None:
            raise
        sys.exit(code)


def tell(error: BaseException) -> int | None:
    """Says in a line what ended a command: the exit code; None: a bug, to be shown whole."""
    if isinstance(error, KeyboardInterrupt):
        told, code = "interrupted", 1
    elif isinstance(error, FloatingPointError):
        told, code = f"error: {error}", 1
    elif isinstance(error, ValueError | OSError) and _is_users(error):
        if os.environ.get("GPT_JAX_TRACEBACK"):
            return None
        told, code = f"error: {' '.join(str(error).split())}", _USER_MISTAKE
    else:
        return None
    print(told, file=sys.stderr)
    return code


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list]:
    """The arguments, and the overrides `a.b=value` of --config.a.b=value."""
    arguments, rest = parser.parse_known_args(argv)
    prefix = "--config."
    takes_config = hasattr(arguments, "config")
    for word in rest:
        if not (takes_config and word.startswith(prefix)):
            parser.error(f"unknown argument {word}")
    return arguments, [word.removeprefix(prefix) for word in rest]


def _is_users(error: BaseException) -> bool:
    """Whether our own code or a config raised it: a library's error is a bug of ours."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = os.path.abspath(last).startswith(package + os.sep) or f"{os.sep}configs{os.sep}" in last
    # Ours begin with what is wrong and a colon; int("x") or a reshape, called by us, do not.
    worded = ours and re.match(r"-{0,2}[\w.,/\[\] -]{1,60}: ", str(error))
    return bool(worded) or (isinstance(error, OSError) and error.errno in _USERS_ERRNOS)
