"""The steps behind README.md: rates, pretraining, scratch and finetuned runs, labels, the tables.

  python experiments/pretraining_vs_finetuning/study.py [--root=runs/transfer] [--processes=1]

What is done is left alone, what broke is continued. `--debug` is the same with few runs of a few
steps: it shows that the steps fit together, and nothing else. `--config.a.b=value` goes to every
run. Ledgers and figures of the real study are kept beside this file.
"""

import pathlib

from analysis import analyse

from gpt_jax.launch.study import arguments, gpt_jax, sweep

HERE = pathlib.Path(__file__).parent
CONFIG = HERE / "config.py"
DATA = ("gutenberg", "sotu", "shakespeare", "vader_movie")
TASK = "sentiment_en"


def main(words: list[str] | None = None) -> None:
    """The script."""
    args = arguments(__doc__, "runs/transfer", words)
    kept = args.root if args.debug else HERE
    kept.mkdir(parents=True, exist_ok=True)

    def runs_of(name: str, argument: str = "") -> None:
        sweep(f"{CONFIG}{argument}", name, args.root, kept / f"{name}.jsonl", args)

    if args.debug:
        runs_of("debug")
        analyse(args.root / "debug.jsonl", args.root / "figures")
        return
    gpt_jax("data", "fetch", *DATA)
    runs_of("finetuning_rates")
    runs_of("transfer")
    labelled = f":task={TASK}"
    runs_of("labelled", labelled)
    for run in sorted(args.root.glob("*-sentiment-*-s?")):
        if not (run / "evaluations.jsonl").exists():
            gpt_jax("evaluate", f"--run={run}", f"--tasks={TASK}")
    runs_of("labelled", labelled)  # trains nothing: the ledger with what was measured
    analyse(HERE / "transfer.jsonl", HERE / "figures")


if __name__ == "__main__":
    main()
