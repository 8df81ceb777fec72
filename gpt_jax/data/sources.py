"""From a DataConfig to the texts of its train and validation split."""

import os
from pathlib import Path

from gpt_jax.data.chain import Chain
from gpt_jax.data.config import DataConfig
from gpt_jax.data.corpora import CORPORA, corpus_folder
from gpt_jax.data.corpus_rows import SPLITS
from gpt_jax.data.documents import TRAIN, VALIDATION, Collection, Documents, held_out, whole
from gpt_jax.data.jsonl import JsonLines
from gpt_jax.data.text_files import TextFiles
from gpt_jax.data.tfds_source import (
    TfdsSplit,
    builder_from_directory,
    data_dir,
    import_tfds,
    open_builder,
    prepare_builder,
    tfds_report,
)

TEXT, JSONL, TOKEN_ROWS, TFDS = "text", "jsonl", "token rows", "tfds"
_KINDS = {".jsonl": JSONL, ".ndjson": JSONL, ".npy": TOKEN_ROWS}
_DEFAULT_PATTERN = DataConfig.pattern
_STDLIB = "python_stdlib"


def open_source(config: DataConfig, split: str, cache_dir) -> Documents:
    """The texts of one split.

    Args:
      config: which corpus.
      split: "train" or "validation".
      cache_dir: where digests, indices and prepared datasets are kept.

    Raises:
      ValueError: the corpus does not exist, is empty or cannot be read.
    """
    assert split in (TRAIN, VALIDATION), split
    tfds_split = config.train_split if split == TRAIN else config.validation_split
    path, option = config.path, "path"
    if split == VALIDATION and config.validation_path:
        path, option = config.validation_path, "validation_path"
    if not path:
        return _not_empty(whole(_named(config, split, cache_dir), config), split)
    kind, files = find_files(path, config.pattern, option)
    if kind == TFDS:
        builder = builder_from_directory(path)
        return _not_empty(whole(TfdsSplit(builder, tfds_split, config.field), config), split)
    if kind == JSONL:
        collection = JsonLines(path, files, config.field, cache_dir)
    elif kind == TEXT:
        collection = TextFiles(path, files, cache_dir)
    else:
        raise ValueError(f"data.{option}: {path!r} holds token rows, not text")
    _not_empty(collection, split)
    if config.validation_path:
        return whole(collection, config)
    return held_out(collection, config, split)


def find_files(path: str, pattern: str, option: str = "path") -> tuple[str, list[str]]:
    """What a path holds; `option` names the config's field in messages.

    Returns:
      "text", "jsonl", "token rows" or "tfds", and the files, sorted (none for "tfds").

    Raises:
      ValueError: nothing there, no file of the pattern, or files of several kinds.
    """
    if not os.path.exists(path):
        raise ValueError(
            f"data.{option}: {path!r} does not exist; "
            "give a folder of text files, a .jsonl file or token rows"
        )
    if os.path.isfile(path):
        return _KINDS.get(Path(path).suffix, TEXT), [path]
    if os.path.exists(os.path.join(path, "dataset_info.json")):
        return TFDS, []
    files = _glob(path, pattern)
    kind = _KINDS.get(Path(pattern).suffix, TEXT)
    if not files and pattern == _DEFAULT_PATTERN:
        # Nobody chose, and there is no text: whichever other kind is there.
        found: dict[str, list[str]] = {}
        for suffix, other in _KINDS.items():
            found.setdefault(other, []).extend(_glob(path, f"**/*{suffix}"))
        found = {other: sorted(names) for other, names in found.items() if names}
        if len(found) > 1:
            raise ValueError(
                f"data.pattern: {path!r} holds files of several kinds ({', '.join(found)}); "
                "choose with data.pattern, such as '**/*.jsonl'"
            )
        kind, files = next(iter(found.items()), (TEXT, []))
    if not files:
        others = len(_glob(path, "**/*"))
        if not others:
            raise ValueError(f"data.{option}: {path!r} holds no file")
        raise ValueError(
            f"data.pattern: {pattern!r} matches none of the {others} files in "
            f"{path!r}; name the files, such as '**/*.md'"
        )
    return kind, files


def _glob(path: str, pattern: str) -> list[str]:
    try:
        return sorted(str(file) for file in Path(path).glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"data.pattern: {pattern!r} is no relative glob: {error}") from None


def _named(config: DataConfig, split: str, cache_dir) -> Collection:
    """A split of one named corpus, or of several that "+" joins, one after the other."""
    if config.name in (_STDLIB, *CORPORA) or ":" in config.name:
        return _one_named(config.name, config, split, cache_dir)
    names = config.name.split("+")
    return Chain(config.name, [_one_named(name, config, split, cache_dir) for name in names])


def _one_named(name: str, config: DataConfig, split: str, cache_dir) -> Collection:
    which = config.train_split if split == TRAIN else config.validation_split
    if name not in CORPORA:
        return TfdsSplit(_builder(name, cache_dir), which, config.field)
    folder = corpus_folder(name, cache_dir)
    if which not in SPLITS:
        raise ValueError(
            f"data.{split}_split: {which!r} is no split of {name!r}; it has {', '.join(SPLITS)}"
        )
    path = str(folder / f"{which}.jsonl")
    collection = JsonLines(path, [path], config.field, cache_dir)
    collection.label = name  # the same on every machine
    return collection


def _builder(name: str, cache_dir):
    if name != _STDLIB:
        return open_builder(name, cache_dir)
    import_tfds()
    from gpt_jax.data.python_stdlib import PythonStdlib

    with tfds_report(quiet=True):
        builder = PythonStdlib(data_dir=data_dir(cache_dir), file_format="array_record")
        return prepare_builder(builder)


def _not_empty(collection, split: str):
    if not len(collection):
        raise ValueError(f"data.path: {collection.label} holds no document for the {split} split")
    return collection
