"""Where a task's examples come from: a named corpus, a TFDS dataset, or one's own JSON lines."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpt_jax.data.hashing import unit_hash

SPLITS = ("train", "validation", "test")
# Of one's own single file: the rest is for training.
_SHARES = {"validation": 0.05, "test": 0.05}


class Examples(Sequence):
    """The rows of a split: dicts by number, read when they are asked for.

    Args:
      size: How many there are.
      read: From a number to a row.
      name: From a number to what a message calls the row.
    """

    def __init__(self, size: int, read: Callable[[int], dict], name: Callable[[int], str]):
        self._size, self._read, self.name = size, read, name

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self._size:
            raise IndexError(i)
        return self._read(i)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Data of a task.

    Attributes:
      name: A named corpus ("vader_movie"), a TFDS dataset ("glue/sst2:2.0.0"), a folder with a
        JSONL file a split ("my/data", which holds train.jsonl ...), or one JSONL file, of which a
        hash of each line puts 5 % into validation and 5 % into test.
      splits: What TFDS calls our splits, where that differs.
      fields: What the data call our fields, where that differs.
      values: By field, what the data call our values, where that differs.
    """

    name: str
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def examples(self, split: str, cache_dir, limit: int = 0) -> Examples:
        """The rows of a split under our names.

        Args:
          split: One of SPLITS.
          cache_dir: Where corpora and prepared TFDS datasets are.
          limit: At most so many, evenly over the split, as files may be sorted by label; 0: all.

        Raises:
          ValueError: no such split, or the data are not here; the text says how to get them.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        if self.name.endswith(".jsonl"):
            found = _json_lines(Path(self.name), f"{self.name} line", split)
        elif Path(self.name).is_dir():
            path = Path(self.name) / f"{split}.jsonl"
            found = _json_lines(path, f"{path} line")
        elif "/" in self.name or ":" in self.name:
            found = _tfds_rows(self.name, self.splits.get(split, split), cache_dir)
        else:
            found = _corpus_rows(self.name, split, cache_dir)
        total = len(found)
        size = min(limit, total) if limit else total

        def place(i: int) -> int:
            return i * total // size

        return Examples(
            size, lambda i: self._rename(found[place(i)]), lambda i: found.name(place(i))
        )

    def _rename(self, row: dict) -> dict:
        ours = {our: row[their] for our, their in self.fields.items() if their in row}
        row = {**row, **ours}
        for field, values in self.values.items():
            if isinstance(row.get(field), str):
                row[field] = values.get(row[field], row[field])
        return row


def distinct_values(path: str, field: str) -> list[str]:
    """The texts that stand under a field of one's own training rows, alone or in lists; sorted.

    Raises:
      ValueError: the file cannot be read.
    """
    spec, values = DataSpec(path), set()
    # All of a single file: a split of it might lack a rare one.
    whole = _json_lines(Path(path), f"{path} line") if path.endswith(".jsonl") else None
    for row in spec.examples("train", None) if whole is None else whole:
        value = row.get(field)
        values.update(value if isinstance(value, list) else [value])
    return sorted(value for value in values if isinstance(value, str))


def _corpus_rows(name: str, split: str, cache_dir) -> Examples:
    from gpt_jax.data.corpora import corpus_folder

    folder = corpus_folder(name, cache_dir)
    path = folder / f"{split}.jsonl"
    if not path.exists() or not path.stat().st_size:
        have = [s for s in SPLITS if (p := folder / f"{s}.jsonl").exists() and p.stat().st_size]
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(have)}")
    return _json_lines(path, f"{name} {split} row")


def _json_lines(path: Path, label: str, part: str = "") -> Examples:
    """The rows of a file; of one split of it where `part` is given."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: byte {error.start}") from None
    # Not splitlines(), which also ends lines at characters that JSON allows inside of strings.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if part:
        lines = [(n, line) for n, line in lines if _part(line) == part]

    def name(i: int) -> str:
        return f"{label} {lines[i][0]}"

    def read(i: int) -> dict:
        try:
            row = json.loads(lines[i][1])
        except ValueError as error:
            raise ValueError(f"{name(i)} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name(i)} is a {type(row).__name__}, not a JSON object")
        return row

    return Examples(len(lines), read, name)


def _part(line: str) -> str:
    at = unit_hash(line.strip())
    for split, share in _SHARES.items():
        if at < share:
            return split
        at -= share
    return "train"


def _tfds_rows(name: str, split: str, cache_dir) -> Examples:
    from gpt_jax.data.tfds_source import import_tfds, open_builder, tfds_report

    import_tfds()
    # The registry of TFDS learns of the translation sets only by this line.
    import tensorflow_datasets.translate  # noqa: F401

    builder = open_builder(name, cache_dir)
    try:
        with tfds_report(quiet=True):
            source = builder.as_data_source(split)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} has no split {split!r}: {error}") from None
    features = builder.info.features
    return Examples(
        len(source), lambda i: _plain(source[i], features), lambda i: f"{name} {split} row {i + 1}"
    )


def _plain(value, feature):
    """A TFDS value as JSON would have it: text as str, classes by their names, arrays as lists."""
    if isinstance(value, dict):
        return {key: _plain(item, feature[key]) for key, item in value.items()}
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return [_plain(item, inner) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    names = getattr(feature, "names", None)
    if names and 0 <= int(value) < len(names):
        return names[int(value)]
    return value.item() if hasattr(value, "item") else value
