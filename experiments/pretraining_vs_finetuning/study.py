"""The steps behind README.md: rates, pretraining, scratch and finetuned runs, labels, the tables.

  python experiments/pretraining_vs_finetuning/study.py [--root=runs/transfer] [--processes=1]

What is done is left alone, what broke is continued. `--debug` is the same with few runs of a few
steps: it shows that the steps fit together, and nothing else. `--config.a.b=value` goes to every
run. Ledgers and figures of the real study are kept beside this file.
"""

import argparse
import pathlib
import subprocess
import sys

from analysis import analyse

HERE = pathlib.Path(__file__).parent
CONFIG = HERE / "config.py"
DATA = ("gutenberg", "sotu", "shakespeare", "vader_movie")
TASK = "sentiment_en"


def gpt_jax(*words: str) -> None:
    """One command of the program, or the end of the study."""
    print("+ gpt-jax", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "gpt_jax", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def sweep(name: str, args: argparse.Namespace, kept: pathlib.Path, config: str = "") -> None:
    """Trains what is missing of a sweep; its ledger is kept beside this file."""
    gpt_jax(
        "sweep", f"--config={CONFIG}{config}", f"--sweep={name}", f"--workdir={args.root}",
        f"--ledger={kept / f'{name}.jsonl'}", f"--processes={args.processes}", *args.overrides,
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=lambda word: pathlib.Path(word).absolute(),
                        default=pathlib.Path("runs/transfer").absolute())  # fmt: skip
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--debug", action="store_true")
    args, args.overrides = parser.parse_known_args(words)
    if any(not word.startswith("--config.") for word in args.overrides):
        parser.error(f"unknown argument {args.overrides[0]}")

    if args.debug:
        args.root.mkdir(parents=True, exist_ok=True)
        sweep("debug", args, args.root)
        analyse(args.root / "debug.jsonl", args.root / "figures")
        return
    gpt_jax("data", "fetch", *DATA)
    sweep("finetuning_rates", args, HERE)
    sweep("transfer", args, HERE)
    labelled = f":task={TASK}"
    sweep("labelled", args, HERE, labelled)
    for run in sorted(args.root.glob("*-sentiment-*-s?")):
        if not (run / "evaluations.jsonl").exists():
            gpt_jax("evaluate", f"--run={run}", f"--tasks={TASK}")
    sweep("labelled", args, HERE, labelled)  # trains nothing: the ledger with what was measured
    analyse(HERE / "transfer.jsonl", HERE / "figures")


if __name__ == "__main__":
    main()
