"""The steps behind README.md: noise, rates, ladder, prediction, the run it is of, the page.

  python experiments/predictable_scaling/study.py [--root=runs/predictable_scaling] [--processes=1]

What is done is left alone, what broke is continued. `--debug` is a ladder of six tiny runs with a
seventh ten times as expensive, in seconds: it shows that the steps fit together, and nothing else.
`--config.a.b=value` goes to every run. Ledgers, the prediction and the page's figures of the real
study are kept beside this file.
"""

import argparse
import json
import pathlib
import shutil

from gpt_jax.launch.study import arguments, gpt_jax, sweep

HERE = pathlib.Path(__file__).parent
CONFIG = HERE / "config.py"
DATA = ("sympy_code", "django_code")
# Runs of fewer than 250 steps are left out of the fits: of them the warm-up tells. Chosen by the
# ladder's own residuals, before the held-out run.
MIN_TOKENS = 512_000
MEASURES = "python_lines/next_line_logprob,python_lines/parse_rate"
HELD_OUT, HELD_OUT_DEBUG = "size=442k,flops=3e13", "size=12k,flops=1.5e10"
# The first one's rates were too high for so many steps (README.md).
AGAIN = "size=307k,flops=3e13"
LOWER = ("--config.optimizer.learning_rate=0.025", "--config.optimizer.muon_learning_rate=0.02")


def rows_of(path: pathlib.Path) -> list[dict]:
    """Of a file of JSON lines; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(run: pathlib.Path) -> None:
    """How well a run goes on with held-out Python, unless that is known."""
    if all(row["task"] != "python_lines" for row in rows_of(run / "evaluations.jsonl")):
        gpt_jax("evaluate", f"--run={run}", "--tasks=python_lines")


def best_of_budgets(ledger: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The run with the lowest loss of each budget that is in the fits."""
    best: dict[str, dict] = {}
    for row in rows_of(ledger):
        if row["status"] == "finished" and row["num_tokens"] >= MIN_TOKENS:
            best[row["group"]] = min(best.get(row["group"], row), row, key=lambda r: r["loss"])
    return [folder / row["name"] for row in best.values()]


def hold_out(
    name: str, argument: str, how: list[str], args: argparse.Namespace, copy: pathlib.Path
) -> pathlib.Path:
    """Predicts a run, unless that is done, keeps a copy of the prediction, and trains the run."""
    run, config = args.root / name, f"{CONFIG}:{argument}"
    if not (run / "prediction.json").exists():
        gpt_jax("scaling", "predict", *how, f"--config={config}", f"--workdir={run}",
                *args.overrides)  # fmt: skip
        shutil.copy(run / "prediction.json", copy)
    gpt_jax("train", f"--config={config}", f"--workdir={run}", *args.overrides)
    return run


def main(words: list[str] | None = None) -> None:
    """The script."""
    args = arguments(__doc__, "runs/predictable_scaling", words)
    kept = args.root if args.debug else HERE
    kept.mkdir(parents=True, exist_ok=True)

    def runs_of(name: str) -> pathlib.Path:
        return sweep(str(CONFIG), name, args.root / name, kept / f"{name}.jsonl", args)

    if not args.debug:
        gpt_jax("data", "fetch", *DATA)
        runs_of("learning_rate")
        runs_of("noise")
    ladder = "debug" if args.debug else "ladder"
    ledger = runs_of(ladder)
    how = [f"--ledger={ledger}"]
    if not args.debug:
        for run in best_of_budgets(ledger, args.root / ladder):
            measure(run)
        runs_of(ladder)  # trains nothing: the ledger with what was measured
        how.append(f"--min_tokens={MIN_TOKENS}")
    gpt_jax("scaling", "fit", *how)

    measured = [] if args.debug else [f"--measures={MEASURES}"]
    runs = [hold_out("held_out", HELD_OUT_DEBUG if args.debug else HELD_OUT, [*how, *measured],
                     args, kept / "prediction.json")]  # fmt: skip
    if not args.debug:
        measure(runs[0])
        runs_of("afterwards")
        args.overrides += LOWER
        runs.append(hold_out("held_out_again", AGAIN, how, args, kept / "prediction_again.json"))
    for run in runs:
        gpt_jax("scaling", "score", f"--run={run}")
    places = ",".join(map(str, (args.root / ladder, *runs)))
    gpt_jax("report", f"--runs={places}", f"--out={args.root / 'report.html'}",
            "--title=Predictable scaling", f"--png={kept / 'figures'}",
            f"--min_tokens={0 if args.debug else MIN_TOKENS}")  # fmt: skip


if __name__ == "__main__":
    main()
