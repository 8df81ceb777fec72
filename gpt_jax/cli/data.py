"""Fetches corpora and small pretrained models by name; shows rows as a model will see them.

gpt-jax data fetch                      lists them, with licenses
gpt-jax data fetch gutenberg vader_movie
gpt-jax data inspect --config=configs/finetune_sentiment.py --rows=2
"""

import argparse
import os
import shutil
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    fetch = commands.add_parser("fetch", help="download corpora or models; without a name, list")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="what to fetch")
    fetch.add_argument("--again", action="store_true", help="also what is there already")
    inspect = commands.add_parser("inspect", help="show rows of a config's training batches")
    inspect.add_argument("--config", required=True, metavar="FILE[:args]", help="a config file")
    inspect.add_argument("--rows", type=int, default=4, help="how many (default: 4)")
    inspect.add_argument("--index", type=int, default=0, help="of the first batch (default: 0)")
    inspect.add_argument("--part", default="", metavar="NAME", help="only rows of this task")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return {"fetch": _fetch, "inspect": _inspect}[arguments.data_command](arguments, overrides)


def _fetch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.data.corpus_fetch import check_name, fetch
    from gpt_jax.parallel.cache_folder import cache_dir

    if not arguments.names:
        _list(cache_dir())
    for name in arguments.names:
        check_name(name)  # all of them before the first download
    for name in arguments.names:
        fetch(name, cache_dir(), lambda line: print(line, flush=True), arguments.again)
    return 0


def _list(cache_dir) -> None:
    """Prints the tables: a line for each, then what is to be known about some."""
    from gpt_jax.data.corpora import CORPORA
    from gpt_jax.data.corpus_fetch import read_manifest
    from gpt_jax.data.model_packages import MODELS

    rows = []
    for corpus in CORPORA.values():
        fetched = read_manifest(cache_dir / "corpora" / corpus.name)
        size = sum(package.megabytes for package in corpus.packages)
        rows.append((corpus, corpus.kind, size, fetched))
    for model in MODELS.values():
        fetched = read_manifest(cache_dir / "models" / model.name)
        rows.append((model, "model", model.package.megabytes, fetched))
    print(f"{'name':21} {'kind':14} {'download':>9}  {'license':32}  here")
    for item, kind, size, fetched in rows:
        here = "yes" if fetched else "-"
        print(f"{item.name:21} {kind:14} {size:>6.1f} MB  {item.license:32}  {here}")
    print("\nwhat they are")
    for item, *_ in rows:
        print(f"  {item.name:21} {item.about}" + (f". NOTE: {item.note}" if item.note else ""))


def _inspect(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.convert.source import inherit_model
    from gpt_jax.parallel.cache_folder import cache_dir
    from gpt_jax.runs.config import run_config
    from gpt_jax.runs.config_file import load_config

    for name, least in (("rows", 1), ("index", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name}: {getattr(arguments, name)} is not at least {least}")
    values, _ = load_config(arguments.config, overrides)
    config = run_config(inherit_model(values))

    from gpt_jax.reports.inspection import inspect
    from gpt_jax.reports.token_lines import Page
    from gpt_jax.runs.data import prepare_run

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    page = Page(shutil.get_terminal_size((100, 24)).columns, terminal and not os.getenv("NO_COLOR"))
    data = prepare_run(config, cache_dir())
    chosen = {name: getattr(arguments, name) for name in ("rows", "index", "part")}
    try:
        for line in inspect(config, data, cache_dir(), page, **chosen):
            print(line)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
