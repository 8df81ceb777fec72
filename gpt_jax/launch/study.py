"""A study as one command: its steps are commands of the program, each a process.  Starts no JAX."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from gpt_jax.launch import warm


def gpt_jax(*words: str) -> None:
    """Runs one command; a study whose step fails ends with the step's exit code."""
    print("+ gpt-jax", *words, flush=True)
    command = ["-m", "gpt_jax", *words]
    if words[0] == "sweep":  # itself it only starts processes: from here they begin warm
        code = _exit_code(command)
    else:
        process = warm.start(command)
        process.join()
        code = process.exitcode
    if code:
        sys.exit(code)


def _exit_code(command: Sequence[str]) -> int:
    try:
        warm.run(command)
    except SystemExit as end:
        return end.code
    return 0


def arguments(doc: str, root: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """What a study is told.

    Args:
      doc: Of its script.
      root: Where its runs lie, unless --root says another place.
      words: Of the command line; None: the process's own.

    Returns:
      root (an absolute path), processes, debug, and overrides: "--config.a.b=value" for every run.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(root))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--debug", action="store_true")
    args, args.overrides = parser.parse_known_args(words)
    for word in args.overrides:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    args.root = args.root.absolute()
    return args


def sweep(
    config: str, name: str, workdir: pathlib.Path, ledger: pathlib.Path, args: argparse.Namespace
) -> pathlib.Path:
    """Trains what is missing of a sweep, and writes its ledger; returns the ledger.

    Args:
      config: "FILE[:args]".
      name: Of the sweep.
      workdir: Where its runs lie.
      ledger: The file.
      args: Of `arguments`.
    """
    gpt_jax(
        "sweep", f"--config={config}", f"--sweep={name}", f"--workdir={workdir}",
        f"--ledger={ledger}", f"--processes={args.processes}", *args.overrides,
    )  # fmt: skip
    return ledger
