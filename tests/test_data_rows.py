"""Streams and rows: every target once, segments and positions, chunks, interruptions, damage."""

import json

import numpy as np
import pytest

from gpt_jax.data import stream as stream_module
from gpt_jax.data.packing import Rows, SomeRows, TokenRows, make_batch
from gpt_jax.data.stream import prepare_stream
from gpt_jax.data.tokenizers import byte_tokenizer

EOS = 256


class Texts:
    """Documents from a list; can fail at one of them, and remembers which were read."""

    label = "texts"

    def __init__(self, texts, fail_at=None):
        self.texts, self.fail_at, self.read = texts, fail_at, []

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        if i == self.fail_at:
            raise KeyboardInterrupt
        self.read.append(i)
        return self.texts[i]

    def document_name(self, i):
        return f"text {i}"


def sample_texts(count=40):
    rng = np.random.default_rng(0)
    return ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 30)))) for _ in range(count)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(stream_module, "_ENCODE_BYTES", 24)


def flat(texts):
    parts = [[EOS, *text.encode()] for text in texts if text]
    return np.concatenate([*parts, [EOS]])


def all_rows(rows):
    return rows.batch(range(len(rows)))


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 1000])
def test_every_target_exactly_once_across_chunk_borders(seq_len, tmp_path, small_chunks):
    texts = sample_texts()
    stream = prepare_stream(Texts(texts), byte_tokenizer(), tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) > 5
    rows = Rows(stream, seq_len, 257, EOS)
    batch, expected = all_rows(rows), flat(texts)
    mask = batch["loss_mask"] == 1.0
    np.testing.assert_array_equal(batch["targets"][mask], expected[1:])
    np.testing.assert_array_equal(batch["tokens"][mask], expected[:-1])
    assert rows.num_tokens == len(expected) - 1 == mask.sum()
    assert rows.num_bytes == sum(len(text) for text in texts)
    assert rows.num_documents == len(texts)
    for name, dtype in [("tokens", np.int32), ("loss_mask", np.float32), ("positions", np.int32)]:
        assert batch[name].dtype == dtype and batch[name].shape == (len(rows), seq_len)


def test_segments_and_positions():
    batch = make_batch([np.array([5, EOS, 7, 8, EOS, EOS, 9, 1]), np.array([EOS, 3, 4])], 7, EOS)
    assert batch["segment_ids"].tolist() == [[1, 2, 2, 2, 3, 4, 4], [1, 1, 0, 0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 0, 1, 2, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["tokens"].tolist() == [[5, EOS, 7, 8, EOS, EOS, 9], [EOS, 3, 0, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[EOS, 7, 8, EOS, EOS, 9, 1], [3, 4, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1] * 7, [1, 1, 0, 0, 0, 0, 0]]


def test_rows_out_of_range_are_padding(tmp_path):
    rows = Rows(prepare_stream(Texts(["abc"]), byte_tokenizer(), tmp_path), 2, 257, EOS)
    batch = rows.batch([-1, 0, len(rows)])
    for array in batch.values():
        assert not array[0].any() and not array[2].any()
    assert batch["loss_mask"][1].all()


def test_empty_and_skipped_documents_are_left_out(tmp_path, small_chunks):
    texts = ["", "ab", None, "", "c", None, ""]
    stream = prepare_stream(Texts(texts), byte_tokenizer(), tmp_path)
    np.testing.assert_array_equal(stream.read(0, 99), [EOS, 97, 98, EOS, 99, EOS])
    assert (stream.num_documents, stream.num_bytes) == (2, 3)
    assert stream.skipped == ("text 2", "text 5")
    assert prepare_stream(Texts([]), byte_tokenizer(), tmp_path).skipped == stream.skipped


def test_a_corpus_without_text_is_refused(tmp_path):
    for i, texts in enumerate(([""], [None, ""])):
        with pytest.raises(ValueError, match=r"data.path: texts holds no text in its"):
            prepare_stream(Texts(texts), byte_tokenizer(), tmp_path / str(i))


def test_nul_bytes_and_one_long_line(tmp_path):
    text = "\x00" * 300_000 + "한" * 1000
    stream = prepare_stream(Texts([text]), byte_tokenizer(), tmp_path)
    assert stream.num_bytes == 303_000 == stream.num_tokens - 2
    assert bytes(stream.read(1, 303_001).astype(np.uint8)).decode() == text


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_preparation_goes_on(tmp_path, small_chunks):
    texts = sample_texts()
    prepare_stream(Texts(texts), byte_tokenizer(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare_stream(Texts(texts, fail_at=25), byte_tokenizer(), tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = Texts(texts)
    prepare_stream(again, byte_tokenizer(), tmp_path / "cut")
    assert 15 < again.read[0] <= 25, "whole chunks were made again"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    opened = Texts(texts)
    prepare_stream(opened, byte_tokenizer(), tmp_path / "cut")
    assert not opened.read


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "delete", "manifest", "empty manifest", "grow"]
)
def test_damage_is_repaired_with_a_warning(damage, tmp_path, small_chunks, capsys):
    texts = sample_texts()
    prepare_stream(Texts(texts), byte_tokenizer(), tmp_path)
    whole = files(tmp_path)
    name = "manifest.json" if "manifest" in damage else "chunk-00002.npy"
    data = bytearray(whole[name])
    if damage == "flip":
        data[-3] ^= 1
    data = {"truncate": data[:-2], "manifest": data[:50], "grow": data + b"x"}.get(damage, data)
    (tmp_path / name).write_bytes(b"" if damage == "empty manifest" else data)
    if damage == "delete":
        (tmp_path / name).unlink()
    again = Texts(texts)
    prepare_stream(again, byte_tokenizer(), tmp_path)
    assert files(tmp_path) == whole
    assert f"{name} is damaged; tokenising again" in capsys.readouterr().err
    assert len(again.read) < len(texts) / 2, "undamaged chunks were made again"


def test_damage_after_opening_is_noticed(tmp_path, small_chunks):
    texts = sample_texts()
    rows = Rows(prepare_stream(Texts(texts), byte_tokenizer(), tmp_path), 16, 257, EOS)
    path = tmp_path / "chunk-00001.npy"
    tokens = np.load(path)
    tokens[5] = 257
    np.save(path, tokens)
    with pytest.raises(ValueError, match=r"tokens: .* holds an id beyond the vocabulary of 257"):
        all_rows(rows)
    rows = Rows(prepare_stream(Texts(texts), byte_tokenizer(), tmp_path), 16, 257, EOS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"tokens: .*chunk-00001.npy cannot be read"):
        all_rows(rows)
    np.save(path, tokens[:-1])
    with pytest.raises(ValueError, match=r"tokens: .*chunk-00001.npy holds \(\d+,\) tokens, not"):
        all_rows(Rows(rows._stream, 16, 257, EOS))


def test_a_chunk_record_of_other_documents_is_not_taken(tmp_path, small_chunks):
    texts = sample_texts()
    prepare_stream(Texts(texts), byte_tokenizer(), tmp_path)
    whole = files(tmp_path)
    record = json.loads(whole["chunk-00001.json"])
    (tmp_path / "chunk-00001.json").write_text(json.dumps(record | {"first": 0}))
    (tmp_path / "manifest.json").unlink()
    prepare_stream(Texts(texts), byte_tokenizer(), tmp_path)
    assert files(tmp_path) == whole


# Token rows.


@pytest.fixture
def token_files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i, dtype in enumerate((np.uint16, np.int64)):
        paths.append(str(tmp_path / f"{i}.npy"))
        np.save(paths[-1], rng.integers(0, 256, (20, 9)).astype(dtype))
    return paths


def test_token_rows(token_files, tmp_path):
    rows = TokenRows(token_files, 8, 257, EOS, tmp_path / "c")
    expected = np.concatenate([np.load(path) for path in token_files])
    batch = all_rows(rows)
    assert len(rows) == 40 and rows.num_tokens == 320
    np.testing.assert_array_equal(batch["tokens"], expected[:, :-1])
    np.testing.assert_array_equal(batch["targets"], expected[:, 1:])
    assert not rows.batch([40, -1])["loss_mask"].any()
    parts = [TokenRows(token_files, 8, 257, EOS, tmp_path / "c", span) for span in
             ((0.0, 0.9), (0.9, 1.0))]  # fmt: skip
    np.testing.assert_array_equal(
        np.concatenate([all_rows(part)["tokens"] for part in parts]), batch["tokens"]
    )
    assert len({rows.fingerprint, *(part.fingerprint for part in parts)}) == 3


def test_token_rows_mistakes(token_files, tmp_path):
    def refuses(message, array):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(ValueError, match=message):
            all_rows(TokenRows([*token_files, str(tmp_path / "bad.npy")], 8, 257, EOS, tmp_path))

    refuses(r"data.seq_len: 8 does not fit the rows of 5 tokens.*must be 4", np.zeros((2, 5), int))
    refuses(r"data.path: .* holds float64\[2, 9\]; token rows are integers", np.zeros((2, 9)))
    refuses(r"data.path: .* holds int64\[9\]; token rows are", np.zeros(9, int))
    refuses(r"data.path: .*bad.npy'?: row 1 holds id 257, outside", np.full((2, 9), [[0], [257]]))
    refuses(r"bad.npy'?: row 0 holds id -1, outside", np.full((2, 9), -1))
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError, match=r"data.path: '.*text.npy' is no readable .npy file"):
        TokenRows([str(tmp_path / "text.npy")], 8, 257, EOS, tmp_path)


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_some_rows_are_nested_and_as_they_were(num_rows, tmp_path):
    stream = prepare_stream(Texts(sample_texts()), byte_tokenizer(), tmp_path)
    rows = Rows(stream, 32, 257, EOS)
    some, more = SomeRows(rows, num_rows), SomeRows(rows, num_rows + 2)
    whole, few, many = (
        [tuple(row) for row in all_rows(part)["targets"]] for part in (rows, some, more)
    )
    assert len(set(few)) == num_rows == len(some) and set(few) <= set(many) <= set(whole)
    assert some.num_tokens == all_rows(some)["loss_mask"].sum()
    assert some.fingerprint not in (more.fingerprint, rows.fingerprint)
    assert not some.batch([num_rows])["loss_mask"].any()  # a row beyond the end is padding
    np.testing.assert_array_equal(some.row_tokens(0)[1:], all_rows(some)["targets"][0])


def test_all_rows_of_some_have_all_tokens(tmp_path):
    rows = Rows(prepare_stream(Texts(sample_texts()), byte_tokenizer(), tmp_path), 32, 257, EOS)
    assert SomeRows(rows, len(rows)).num_tokens == rows.num_tokens
