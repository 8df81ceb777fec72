"""The running interpreter's standard library as a TFDS dataset: real code, on every machine.

It needs no network, and reading it needs no TensorFlow.  Python's version is the dataset's: other
interpreters hold other code.
"""

import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from gpt_jax.data.hashing import unit_hash

VALIDATION_SHARE = 0.05
# Tests and demonstrations, a grammar's generated tables, other people's packages.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"),
    *("ensurepip", "site-packages", "dist-packages", "__pycache__"),
}


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Modules of the standard library; about one in twenty is held out, by a hash of its path."""

    name = "python_stdlib"
    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))
    RELEASE_NOTES = {str(VERSION): f"The library of {sys.implementation.name} {sys.version}"}  # noqa: RUF012

    def __init__(self, *, root: str = "", **kwargs):
        self._root = root or sysconfig.get_path("stdlib")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Python modules of {sys.implementation.name} {sys.version.split()[0]}.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            disable_shuffling=True,  # by path, so that the same files give the same bytes
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        modules = list(stdlib_modules(self._root))
        splits = {"train": [], "validation": []}
        for path, text in modules:
            held_out = unit_hash(path) < VALIDATION_SHARE
            splits["validation" if held_out else "train"].append((path, text))
        return {name: self._generate_examples(part) for name, part in splits.items()}

    def _generate_examples(self, modules):
        for number, (path, text) in enumerate(modules):
            yield number, {"path": path, "text": text}


def stdlib_modules(root: str) -> Iterator[tuple[str, str]]:
    """Relative path and text of each module under `root`, sorted by path.

    A module that its own coding cookie cannot decode is left out, and so is an empty one.
    """
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if text:
            yield name, text
