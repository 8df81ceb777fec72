"""TFDS datasets as documents, without TensorFlow wherever the prepared format allows it."""

import contextlib
import importlib.util
import io
import logging
import os
import sys
from pathlib import Path

import numpy as np

from gpt_jax.data.hashing import digest, mix64


class TfdsSplit:
    """The examples of one split of a prepared TFDS builder.

    Args:
      builder: a `tfds.core.DatasetBuilder` that is prepared.
      split: split name or slice.
      field: which feature holds the text.
    """

    def __init__(self, builder, split: str, field: str):
        self.label = builder.info.full_name
        self._field = field
        self._split = split
        _check_field(builder, field)
        _check_split(builder, split)
        self.random_access = not _needs_tensorflow(builder)
        try:
            open_examples = builder.as_data_source if self.random_access else _TensorFlowExamples
            arguments = (split,) if self.random_access else (builder, split)
            self._examples = open_examples(*arguments)
        except (ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"data.train_split, data.validation_split: {split!r} cannot be read from "
                f"{self.label}: {_first_line(error)}"
            ) from None
        sizes = {
            name: [info.num_examples, info.num_bytes] for name, info in builder.info.splits.items()
        }
        self.fingerprint = digest("tfds", self.label, split, field, sizes)

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, i: int) -> str:
        """Dataset, split and example."""
        return f"{self.label} {self._split}[{i}]"

    def raw(self, i: int) -> bytes:
        """The text of example i."""
        text = self._examples[i][self._field]
        if isinstance(text, str):
            return text.encode("utf-8", "surrogatepass")
        return bytes(text)

    def unit_hashes(self) -> np.ndarray:
        """float64[len], by number."""
        return mix64(np.arange(len(self), dtype=np.uint64)) / 2.0**64


def open_builder(name: str, cache_dir):
    """A prepared builder of "name[/config]:version"; prepares it where that is possible.

    Raises:
      ValueError: TFDS knows no such dataset or version, or cannot prepare it here.
    """
    tfds = import_tfds()
    try:
        with tfds_report():
            builder = tfds.builder(name, data_dir=data_dir(cache_dir))
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"data.name: TFDS has no dataset {name.split(':')[0]!r}; see tfds.list_builders(), "
            "or give data.path"
        ) from None
    except (AssertionError, ValueError) as error:
        raise ValueError(f"data.name: {name!r}: {_first_line(error)}") from None
    return prepare_builder(builder)


def builder_from_directory(path: str):
    """The builder of a folder that TFDS prepared (it holds a dataset_info.json)."""
    return import_tfds().builder_from_directory(path)


def prepare_builder(builder):
    """Prepares a builder's files in a format that reads without TensorFlow, unless they exist."""
    if builder.is_prepared():
        return builder
    try:
        with tfds_report():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever a download or a third party's generator may raise
        if builder.is_prepared():  # another process was faster
            return builder
        raise ValueError(
            f"data.name: {builder.info.full_name} is not prepared under {builder.data_path} and "
            f"cannot be prepared here: {_first_line(error)}"
        ) from error
    return builder


@contextlib.contextmanager
def tfds_report(quiet: bool = False):
    """Where TFDS talks while it works: stderr, for stdout belongs to the command that asked.

    It does not warn that what it is about to prepare is not prepared.  `quiet` is for a second's
    work, which needs no report at all.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    stream = io.StringIO() if quiet else sys.stderr
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        logger.setLevel(level)


def data_dir(cache_dir) -> str:
    """Where TFDS keeps prepared datasets."""
    return os.environ.get("TFDS_DATA_DIR") or str(Path(cache_dir) / "tfds")


def import_tfds():
    """tensorflow_datasets, whole."""
    import tensorflow_datasets as tfds

    # Its __init__ swallows import errors and then stands there empty.
    if not hasattr(tfds, "builder"):
        raise ValueError(
            "data.name: tensorflow_datasets is not installed whole; "
            "run 'pip install tensorflow-datasets'"
        )
    # Without this line c4, glue and wikipedia are not found where TensorFlow is missing.
    import tensorflow_datasets.text

    return tfds


class _TensorFlowExamples:
    """The examples of a TFRecord split, read in order through TensorFlow."""

    def __init__(self, builder, split: str):
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"data.name: {builder.info.full_name} is prepared as "
                f"{builder.info.file_format.value}, which only TensorFlow reads; "
                "run pip install 'gpt-jax[tf]'"
            )
        tfds = import_tfds()
        self._size = builder.info.splits[split].num_examples
        # One file at a time, in order: the default reads several at once.
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
        self._dataset = tfds.as_numpy(dataset)
        self._iterator, self._next = iter(self._dataset), 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int):
        if i < self._next:
            self._iterator, self._next = iter(self._dataset), 0
        for example in self._iterator:
            self._next += 1
            if self._next == i + 1:
                return example
        raise IndexError(i)


def _needs_tensorflow(builder) -> bool:
    from tensorflow_datasets.core import file_adapters

    file_format = builder.info.file_format
    return builder.is_prepared() and file_format not in (
        file_adapters.FileFormat.with_random_access()
    )


def _check_field(builder, field: str) -> None:
    features = builder.info.features
    if field not in features:
        raise ValueError(
            f"data.field: {builder.info.full_name} has no feature {field!r}; "
            f"it has {', '.join(map(repr, features))}"
        )


def _check_split(builder, split: str) -> None:
    splits = builder.info.splits
    name = split.split("[")[0]
    if splits and "+" not in split and name not in splits:
        raise ValueError(
            f"data.train_split, data.validation_split: {builder.info.full_name} has no split "
            f"{name!r}; it has {', '.join(splits)}; a part of one is written 'train[99%:]'"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
