"""Fetches corpora and small pretrained models by name.

gpt-jax data fetch                      lists them, with licenses
gpt-jax data fetch gutenberg vader_movie
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    fetch = commands.add_parser("fetch", help="download corpora or models; without a name, list")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="what to fetch")
    fetch.add_argument("--again", action="store_true", help="also what is there already")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return {"fetch": _fetch}[arguments.data_command](arguments, overrides)


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
