"""Makes one self-contained HTML page about several runs: differences, curves, laws, predictions.

gpt-jax report --runs=runs/ladder --out=ladder.html
gpt-jax report --runs=runs/ladder,runs/held_out --out=study.html --png=figures
gpt-jax report --runs=ledger.jsonl --out=ledger.html
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", required=True, metavar="A[,B,...]",
        help="run directories, folders of runs or ledgers (.jsonl)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--title", default="", help="of the page (default: the names of --runs)")
    parser.add_argument(
        "--min_tokens", type=int, default=0, metavar="NUMBER",
        help="leave out of the fits what saw fewer",
    )  # fmt: skip
    parser.add_argument("--png", metavar="FOLDER", help="also the figures as PNG into this folder")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.reports.report import write_report

    places = [place for place in arguments.runs.split(",") if place]
    if not places:
        raise ValueError("--runs: names nothing; a run directory, a folder of runs or a ledger")
    for path in write_report(
        places, arguments.out, arguments.title, arguments.png, arguments.min_tokens
    ):
        print(path)
    return 0
