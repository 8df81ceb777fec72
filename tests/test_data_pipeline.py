"""From a config to batches: the same bytes for any host count, thread or starting point."""

import hashlib
import itertools
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest

from gpt_jax.data.compression import compression_bits_per_byte
from gpt_jax.data.config import DataConfig
from gpt_jax.data.pipeline import evaluation_batches, prepare, train_batches
from gpt_jax.data.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (root / f"{i:02}.txt").write_text(f"document {i}\n" * (i + 1) + "x = f(y)\n" * 5)
    return root


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    config = DataConfig(path=str(corpus), tokenizer="bytes", seq_len=16, validation_fraction=0.2)
    return prepare(config, tmp_path_factory.mktemp("cache"))


def digests(batches, count):
    """sha256 of each of the next batches, indices included."""
    result = []
    for index, batch in itertools.islice(batches, count):
        state = hashlib.sha256(str(index).encode())
        for name in sorted(batch):
            state.update(name.encode() + batch[name].tobytes())
        result.append(state.hexdigest())
    return result


def test_global_batches_do_not_depend_on_hosts(prepared):
    count = 3 * len(prepared.train) // 8  # three epochs
    whole = list(itertools.islice(train_batches(prepared.train, 5, 8, 0), count))
    assert [index for index, _ in whole] == list(range(count))
    for hosts in (2, 4, 8):
        shares = np.split(np.arange(8), hosts)
        parts = [
            itertools.islice(train_batches(prepared.train, 5, 8, 0, share), count)
            for share in shares
        ]
        for (_, batch), *local in zip(whole, *parts, strict=True):
            for name, array in batch.items():
                joined = np.concatenate([part[name] for _, part in local])
                assert joined.tobytes() == array.tobytes()


def test_any_start_gives_the_same_tail(prepared):
    whole = digests(train_batches(prepared.train, 5, 8, 0), 300)
    for start in (1, 17, 123, 299):
        share = train_batches(prepared.train, 5, 8, start)
        assert digests(share, 300 - start) == whole[start:]
    assert digests(train_batches(prepared.train, 6, 8, 0), 300) != whole


def test_threads_and_prefetch_do_not_change_batches(prepared, monkeypatch):
    whole = digests(train_batches(prepared.train, 5, 8, 0), 200)
    for threads, prefetch in ((1, 1), (8, 32)):
        monkeypatch.setattr("gpt_jax.data.pipeline._NUM_THREADS", threads)
        monkeypatch.setattr("gpt_jax.data.pipeline._PREFETCHED_BATCHES", prefetch)
        assert digests(train_batches(prepared.train, 5, 8, 0), 200) == whole


def test_an_epoch_holds_every_target_once(prepared):
    rows = prepared.train
    batches = train_batches(rows, 0, len(rows), 0)
    for _ in range(2):
        _, batch = next(batches)
        assert batch["loss_mask"].sum() == rows.num_tokens
        expected = rows.parts["train"].batch(range(len(rows)))["targets"]
        assert sorted(map(bytes, batch["targets"])) == sorted(map(bytes, expected))


def test_errors_of_the_background_reach_the_caller(prepared):
    class Broken:
        def batch(self, *which):
            raise ValueError("tokens: the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        next(train_batches(Broken(), 0, 4, 0))


def test_the_interpreter_exits_with_a_pipeline_open(corpus, tmp_path):
    code = (
        "from gpt_jax.data.config import DataConfig\n"
        "from gpt_jax.data.pipeline import prepare, train_batches\n"
        f"config = DataConfig(path={str(corpus)!r}, tokenizer='bytes')\n"
        f"batches = train_batches(prepare(config, {str(tmp_path)!r}).train, 0, 64, 0)\n"
        "print(next(batches)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_evaluation_reads_every_row_once_and_pads(prepared, batch_size):
    rows = prepared.validation["validation"]
    batches = list(evaluation_batches(rows, batch_size))
    assert all(batch["tokens"].shape == (batch_size, 16) for batch in batches)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(tokens[: len(rows)], rows.batch(range(len(rows)))["tokens"])
    assert sum(batch["loss_mask"].sum() for batch in batches) == rows.num_tokens
    sizes = prepared.tokenizer.token_bytes()
    num_bytes = sum(sizes[b["targets"]][b["loss_mask"] > 0].sum() for b in batches)
    assert num_bytes == rows.num_bytes


def test_evaluation_shares_and_limits(prepared):
    rows = prepared.validation["validation"]
    whole = list(evaluation_batches(rows, 4))
    shares = [evaluation_batches(rows, 4, np.array(share)) for share in ([0, 1], [2, 3])]
    for batch, *local in zip(whole, *shares, strict=True):
        joined = np.concatenate([part["tokens"] for part in local])
        np.testing.assert_array_equal(joined, batch["tokens"])
    assert len(list(evaluation_batches(rows, 4, max_batches=2))) == 2 < len(whole)


def test_prepare_keeps_what_it_made(corpus, tmp_path, monkeypatch):
    config = DataConfig(path=str(corpus), vocab_size=280, seq_len=16)
    first = prepare(config, tmp_path)
    monkeypatch.setattr("gpt_jax.data.pipeline.train_bpe", None)
    monkeypatch.setattr("gpt_jax.data.stream._make_chunk", None)
    again = prepare(config, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert again.description == first.description == json.loads(json.dumps(first.description))
    assert first.tokenizer.vocab_size == 280
    assert first.description["train"]["documents"] + first.description["validation"][
        "documents"
    ] == 40  # fmt: skip


def test_fingerprint_follows_tokenizer_rows_and_text(corpus, prepared, tmp_path):
    def fingerprint(**fields):
        return prepare(DataConfig(path=str(corpus), **fields), tmp_path).fingerprint

    base = {"tokenizer": "bytes", "seq_len": 16, "validation_fraction": 0.2}
    assert fingerprint(**base) == prepared.fingerprint
    others = [base | {"seq_len": 17}, base | {"tokenizer": "bpe"}]
    others.append(base | {"validation_fraction": 0.5})
    assert len({prepared.fingerprint, *(fingerprint(**other) for other in others)}) == 4


def test_a_given_tokenizer_wins(corpus, tmp_path):
    config = DataConfig(path=str(corpus), tokenizer="/absent.json")
    assert prepare(config, tmp_path, byte_tokenizer()).tokenizer.vocab_size == 257
    with pytest.raises(ValueError, match=r"data.tokenizer: '/absent.json' does not exist"):
        prepare(config, tmp_path)


def test_skipped_documents_are_reported(corpus, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("fine\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\n")
    config = DataConfig(path=str(tmp_path), on_invalid_utf8="skip", tokenizer="bytes")
    description = prepare(config, tmp_path / "c").description
    names = [name for split in ("train", "validation")
             for name in description[split]["skipped_documents"]]  # fmt: skip
    assert names == [str(tmp_path / "bad.txt")]


def test_a_single_file_has_validation(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n" * 200)
    config = DataConfig(path=str(tmp_path / "a.txt"), tokenizer="bytes", seq_len=16)
    data = prepare(config, tmp_path / "c")
    assert data.train.num_bytes + data.validation["validation"].num_bytes == 1800
    assert 50 < data.validation["validation"].num_bytes < 200
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"data.path: .*b.txt holds no text"):
        prepare(DataConfig(path=str(tmp_path / "b.txt"), tokenizer="bytes"), tmp_path / "c")


def test_prepare_token_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40 * 9).reshape(40, 9) % 257)
    config = DataConfig(path=str(tmp_path / "a.npy"), tokenizer="bytes", seq_len=8)
    data = prepare(config, tmp_path / "c")
    assert (len(data.train), len(data.validation["validation"])) == (38, 2)
    assert data.train.parts["train"].batch([28])["segment_ids"].max() == 2  # holds id 256
    with pytest.raises(ValueError, match=r"data.tokenizer: 'bpe' cannot be trained on token rows"):
        prepare(DataConfig(path=str(tmp_path / "a.npy"), seq_len=8), tmp_path / "c")
    np.save(tmp_path / "a.npy", np.zeros((1, 9), int))
    with pytest.raises(ValueError, match=r"data.path: .* holds one row; give data.validation_path"):
        prepare(config, tmp_path / "c")


def test_compression():
    texts = ["abc" * 100, "défg" * 50]
    figures = compression_bits_per_byte(texts)
    size = sum(len(text.encode()) for text in texts)
    joined = "".join(texts).encode()
    assert figures["zlib_all"] == 8 * len(zlib.compress(joined, 9)) / size
    assert figures["zlib_all"] < figures["zlib_each"] < figures["lzma_each"]
    assert set(figures) == {"zlib_each", "zlib_all", "lzma_each", "lzma_all"}
    with pytest.raises(ValueError, match="there is no text"):
        compression_bits_per_byte([""])


def test_few_tokens_of_the_training_split(corpus, cache_dir):
    config = {"path": str(corpus), "tokenizer": "bytes", "seq_len": 16}
    whole = prepare(DataConfig(**config), cache_dir)
    few = prepare(DataConfig(**config, train_tokens=100), cache_dir)
    assert (len(few.train), few.train.num_tokens) == (7, 112)  # whole rows
    assert few.fingerprint != whole.fingerprint
    assert few.validation["validation"].fingerprint == whole.validation["validation"].fingerprint
    with pytest.raises(ValueError, match=r"data.train_tokens: 1000000000 is more than .* has, \d+"):
        prepare(DataConfig(**config, train_tokens=10**9), cache_dir)
