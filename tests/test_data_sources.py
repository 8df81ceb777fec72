"""Sources: files, JSON lines and TFDS; what is held out; and every mistake by its message."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gpt_jax.data import hashing
from gpt_jax.data.config import DataConfig
from gpt_jax.data.sources import find_files, open_source


def texts(config, split, cache):
    return list(open_source(config, split, cache))


@pytest.fixture
def folder(tmp_path):
    """30 text files in two folders."""
    root = tmp_path / "corpus"
    for i in range(30):
        path = root / ("a" if i % 2 else "b") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i}\n")
    return root


def jsonl(path, rows, ending="\n"):
    path.write_text(ending.join(json.dumps(row) for row in rows) + ending)
    return path


# What is held out.


def test_a_folder_holds_out_whole_files(folder, tmp_path):
    config = DataConfig(path=str(folder), validation_fraction=0.2)
    train, validation = (texts(config, split, tmp_path / "c") for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(f"text {i}\n" for i in range(30))
    assert 1 <= len(validation) <= 14
    (folder / "a" / "new.txt").write_text("new")
    again = texts(config, "validation", tmp_path / "c")
    assert set(validation) <= set(again), "an added file moved another one"


def test_a_small_fraction_still_holds_something_out(folder, tmp_path):
    config = DataConfig(path=str(folder), validation_fraction=1e-9)
    assert len(texts(config, "validation", tmp_path / "c")) == 1
    assert len(texts(config, "train", tmp_path / "c")) == 29


@pytest.mark.parametrize(
    "text", ["".join(f"line {i}\n" for i in range(500)), "한" * 998, "no line end " * 99, "a\n" * 3]
)
def test_one_file_holds_out_its_tail(text, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(text, newline="")
    config = DataConfig(path=str(path), validation_fraction=0.1)
    [train], [validation] = (
        texts(config, split, tmp_path / "c") for split in ("train", "validation")
    )
    assert train + validation == text
    assert 0.05 < len(validation) / len(text) <= 0.34
    if "\n" in text:
        assert train.endswith("\n")


def test_validation_path_holds_nothing_out(folder, tmp_path):
    (tmp_path / "own.txt").write_text("held out")
    config = DataConfig(path=str(folder), validation_path=str(tmp_path / "own.txt"))
    assert len(texts(config, "train", tmp_path / "c")) == 30
    assert texts(config, "validation", tmp_path / "c") == ["held out"]


# Reading.


def test_jsonl_rows(tmp_path):
    rows = [{"body": f"row {i} é한"} for i in range(40)]
    path = jsonl(tmp_path / "a.jsonl", rows, ending="\r\n\r\n")
    config = DataConfig(path=str(path), field="body")
    parts = {split: texts(config, split, tmp_path / "c") for split in ("train", "validation")}
    assert sorted(parts["train"] + parts["validation"]) == sorted(row["body"] for row in rows)
    source = open_source(config, "train", tmp_path / "c")  # by the cached index
    assert list(source) == parts["train"]
    assert source.document_name(0).endswith("a.jsonl:1")


def test_a_folder_of_jsonl_is_found_without_a_pattern(tmp_path):
    root = tmp_path / "rows"
    root.mkdir()
    jsonl(root / "a.jsonl", [{"text": "a"}] * 25)
    jsonl(root / "b.jsonl", [{"text": "b"}] * 25)
    config = DataConfig(path=str(root), validation_fraction=0.3)
    train, validation = (texts(config, split, tmp_path / "c") for split in ("train", "validation"))
    assert sorted(train + validation) == ["a"] * 25 + ["b"] * 25
    assert {"a", "b"} == set(validation)


def test_fingerprints_follow_content_not_time(folder, tmp_path, monkeypatch):
    config = DataConfig(path=str(folder))
    first = open_source(config, "train", tmp_path / "c")
    reads = []
    monkeypatch.setattr(hashing, "file_digest", lambda path: reads.append(path) or "x")
    assert open_source(config, "train", tmp_path / "c").fingerprint == first.fingerprint
    assert not reads, "an unchanged file was read again"
    monkeypatch.undo()
    os.utime(folder / "a" / "1.txt", (1, 1))
    assert open_source(config, "train", tmp_path / "c").fingerprint == first.fingerprint
    (folder / "a" / "1.txt").write_text("TEXT 1\n")
    assert open_source(config, "train", tmp_path / "c").fingerprint != first.fingerprint
    assert open_source(config, "validation", tmp_path / "c").fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["text", "jsonl", "escaped"])
def test_invalid_utf8(kind, tmp_path):
    if kind == "text":
        path = tmp_path / "bad.txt"
        path.write_bytes(b"fine\xffnot\nmore\n")
    else:
        path = tmp_path / "bad.jsonl"
        bad = b"\xff" if kind == "jsonl" else b"\\ud800"
        path.write_bytes(b'{"text": "fine' + bad + b'not\\nmore\\n"}\n')
    config = {"path": str(path), "validation_fraction": 0.4}
    with pytest.raises(ValueError, match=r"data.path: .*bad.* byte 4 .*data.on_invalid_utf8"):
        texts(DataConfig(**config), "train", tmp_path / "c")
    skip = DataConfig(**config, on_invalid_utf8="skip")
    assert texts(skip, "train", tmp_path / "c") == [None]
    [replaced] = texts(DataConfig(**config, on_invalid_utf8="replace"), "train", tmp_path / "c")
    assert replaced.startswith("fine\ufffd")


# Mistakes.


def refuses(message, tmp_path, split="train", **fields):
    with pytest.raises(ValueError, match=message) as caught:
        texts(DataConfig(**fields), split, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_missing_and_empty_paths(tmp_path):
    refuses(r"data.path: '/x' does not exist; give a folder of text files", tmp_path, path="/x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.md").write_text("a")
    path = str(tmp_path / "d")
    refuses(r"data.pattern: '\*\*/\*.txt' matches none of the 1 files in", tmp_path, path=path)
    refuses(r"data.pattern: '/\*' is no relative glob", tmp_path, path=path, pattern="/*")
    assert texts(DataConfig(path=path, pattern="*.md"), "validation", tmp_path / "c") == ["a"]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    refuses(r"data.path: .*empty.jsonl holds no document", tmp_path, path=f"{tmp_path}/empty.jsonl")
    refuses(
        r"data.validation_path: '/x' does not exist",
        tmp_path, split="validation", path=path, pattern="*.md", validation_path="/x",
    )  # fmt: skip


def test_folders_of_several_kinds(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    np.save(tmp_path / "b.npy", np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"data.pattern: .*several kinds \(jsonl, token rows\)"):
        find_files(str(tmp_path), "**/*.txt")
    assert find_files(str(tmp_path), "*.npy")[0] == "token rows"
    refuses("holds token rows, not text", tmp_path, path=str(tmp_path), pattern="*.npy")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")

    def deny(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(ValueError, match=r"data.path: '.*a.txt' cannot be read: Permission denied"):
        texts(DataConfig(path=str(path)), "train", tmp_path / "c")


def test_bad_jsonl_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    fields = {"path": str(path), "validation_path": __file__}
    for line, message in [
        ('{"text": "b"', r"data.path: .*a.jsonl:2 is not JSON"),
        ("7", r"data.path: .*a.jsonl:2 is a int, not a JSON object"),
        ("[1]", r"data.path: .*a.jsonl:2 is a list, not a JSON object"),
        ('{"body": 1, "id": 2}', r"data.field: .*a.jsonl:2 has no field 'text'; .* 'body', 'id'"),
        ('{"text": 7}', r"data.field: .*a.jsonl:2 has a int, not text, in 'text'"),
    ]:
        path.write_text('{"text": "a"}\n' + line + "\n")
        refuses(message, tmp_path, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": ""}, "data.name: '' names no corpus"),
        ({"name": "lm1b"}, r"data.name: 'lm1b' has no version; write 'lm1b:1.0.0'"),
        ({"name": "lm1b:one"}, r"data.name: 'lm1b:one' is not of the form"),
        ({"validation_fraction": 0.0}, "data.validation_fraction: 0.0 is out of range"),
        ({"train_tokens": -1}, "data.train_tokens: -1 is below 0"),
        ({"validation_fraction": 0.6}, "data.validation_fraction: 0.6 is out of range"),
        ({"on_invalid_utf8": "ignore"}, "'ignore' is not one of error, skip, replace"),
        ({"vocab_size": 256}, "data.vocab_size: 256 is out of range"),
        ({"seq_len": 0}, "data.seq_len: 0 is out of range"),
        ({"seq_len": 2.5}, "data.seq_len: 2.5 is a float, not int"),
        ({"pattern": ""}, "data.pattern: '' is empty"),
        ({"path": "x", "validation_path": "x"}, "data.validation_path: 'x' is data.path too"),
    ],
)
def test_config_mistakes(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


# TFDS.


@pytest.fixture
def mock_tfds(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with tfds.testing.mock_data(num_examples=5, policy=tfds.testing.MockPolicy.USE_CODE):
        yield tfds


def test_tfds_text(mock_tfds, tmp_path):
    source = open_source(DataConfig(name="lm1b:1.1.0"), "train", tmp_path)
    assert len(list(source)) == 5 and all(source)
    assert source.document_name(3) == "lm1b/1.1.0 train[3]"
    config = DataConfig(name="glue/sst2:2.0.0", field="sentence")
    assert open_source(config, "validation", tmp_path).label == "glue/sst2/2.0.0"


def test_tfds_mistakes(mock_tfds, tmp_path):
    refuses(r"data.name: TFDS has no dataset 'nonsuch'", tmp_path, name="nonsuch:1.0.0")
    refuses(r"data.name: 'lm1b:9.9.9': .*only: 1.1.0", tmp_path, name="lm1b:9.9.9")
    refuses(r"data.field: glue/sst2/2.0.0 has no feature 'text'; it has .*'sentence'", tmp_path,
            name="glue/sst2:2.0.0")  # fmt: skip


@pytest.fixture
def library(tmp_path):
    """A small standard library."""
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {i}\n")
    for name in ("test/test_a.py", "site-packages/b.py", "package1/tests/c.py", "data.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("skipped = True\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (root / "broken.py").write_bytes(b"x = '\xe9'\n")
    (root / "empty.py").write_bytes(b"")
    return root


def test_stdlib_corpus(library, tmp_path):
    from gpt_jax.data.python_stdlib import PythonStdlib, stdlib_modules
    from gpt_jax.data.tfds_source import prepare_builder

    modules = dict(stdlib_modules(str(library)))
    assert len(modules) == 61 and list(modules) == sorted(modules)
    assert modules["latin.py"].endswith("x = 'é'\n")
    builder = prepare_builder(
        PythonStdlib(root=str(library), data_dir=tmp_path / "tfds", file_format="array_record")
    )
    assert str(builder.version) == ".".join(map(str, sys.version_info[:3]))
    paths = {
        split: [example["path"].decode() for example in builder.as_data_source(split)]
        for split in ("train", "validation")
    }
    assert paths["train"] == sorted(paths["train"])
    assert sorted(paths["train"] + paths["validation"]) == list(modules)
    assert 0 < len(paths["validation"]) < 15

    # The same prepared folder, as anyone's own.
    config = DataConfig(path=str(builder.data_path))
    assert texts(config, "train", tmp_path)[0] == modules[paths["train"][0]]
    refuses(r"has no split 'dev'; it has train, validation", tmp_path, split="validation",
            path=str(builder.data_path), validation_split="dev")  # fmt: skip


def test_stdlib_needs_no_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from gpt_jax.data.config import DataConfig\n"
        "assert not {'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules)\n"
        "from gpt_jax.data.sources import open_source\n"
        f"source = open_source(DataConfig(), 'validation', {str(tmp_path)!r})\n"
        "assert len(source) > 10 and 'def ' in ''.join(source)\n"
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TFDS_DATA_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_tfrecord_without_tensorflow_names_the_extra(library, tmp_path, monkeypatch):
    from gpt_jax.data import tfds_source
    from gpt_jax.data.python_stdlib import PythonStdlib

    builder = tfds_source.prepare_builder(
        PythonStdlib(root=str(library), data_dir=tmp_path / "tfds", file_format="array_record")
    )
    monkeypatch.setattr(tfds_source, "_needs_tensorflow", lambda builder: True)
    monkeypatch.setattr(tfds_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"only TensorFlow reads; run pip install 'gpt-jax\[tf\]'"):
        tfds_source.TfdsSplit(builder, "train", "text")
