"""Files of llama2.c as a folder of Hugging Face's."""

import json
import struct

import numpy as np
import pytest

from gpt_jax.convert.source import load_params, model_values, tokenizer_path
from gpt_jax.data.llama2c import write_hf_folder
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.config import TransformerConfig

D, F, L, N, K, T = 8, 12, 2, 2, 1, 4
H = D // N
# Scores fall with the number of a token, as SentencePiece's do; "ab" is before "bc".
PIECES = [" ", "a", "b", "c", "ab", "bc", " a", "abc"]
TOKENS = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([i]) for i in range(256))]
TOKENS += [piece.encode() for piece in PIECES]
ORDER = ["attention_norm", "q", "k", "v", "out", "mlp_norm", "gate", "down", "up"]


def content(vocab: int = len(TOKENS)) -> tuple[bytes, dict[str, np.ndarray]]:
    """(a llama2.data, its arrays by our words)."""
    rng = np.random.default_rng(0)
    shapes = [(len(TOKENS), D), (L, D), (L, D, D), (L, K * H, D), (L, K * H, D), (L, D, D), (L, D),
              (L, F, D), (L, D, F), (L, F, D), (D,), (2, T, H // 2)]  # fmt: skip
    if vocab < 0:
        shapes.append((len(TOKENS), D))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    made = struct.pack("<7i", D, F, L, N, K, vocab, T) + b"".join(x.tobytes() for x in arrays)
    made += struct.pack("<i", 6)
    for i, token in enumerate(TOKENS):
        made += struct.pack("<fi", float(-max(0, i - 262)), len(token)) + token
    return made, dict(zip(["tokens", *ORDER], arrays, strict=False)) | {"head": arrays[-1]}


def read(folder, data):
    (folder / "llama2.data").write_bytes(data)
    write_hf_folder(folder)
    spec = f"hf:{folder}"
    params = load_params(spec, TransformerConfig(**model_values(spec)))
    return spec, {name: np.asarray(array) for name, array in params.items()}


def test_arrays_lie_where_they_belong(tmp_path):
    data, theirs = content()
    spec, params = read(tmp_path, data)
    assert not (tmp_path / "llama2.data").exists()
    values = model_values(spec)
    assert (values["tied"], values["seq_len"], values["num_kv_heads"]) == (True, T, K)
    np.testing.assert_array_equal(params["tokens"], theirs["tokens"])
    np.testing.assert_array_equal(
        params["stack/layers/attention_norm/scale"], theirs["attention_norm"]
    )
    for name in ("gate", "up", "down"):
        kernel = params[f"stack/layers/mlp/{name}/kernel"]
        np.testing.assert_array_equal(kernel, theirs[name].swapaxes(1, 2))
    # A head of 4: the pairs (0, 1) and (2, 3) become (0, 2) and (1, 3).
    q = params["stack/layers/attention/q/kernel"][1, :, 1]  # [D, H]
    np.testing.assert_array_equal(q.T, theirs["q"][1].reshape(N, H, D)[1, [0, 2, 1, 3]])
    np.testing.assert_array_equal(
        params["stack/layers/attention/v/kernel"][0, :, 0].T, theirs["v"][0]
    )


def test_a_head_of_its_own_follows_the_positions(tmp_path):
    data, theirs = content(-len(TOKENS))
    _, params = read(tmp_path, data)
    np.testing.assert_array_equal(params["head"], theirs["head"].T)


def test_neighbours_of_the_highest_score_are_merged_first(tmp_path):
    data, _ = content()
    spec, _ = read(tmp_path, data)
    tokenizer = load_tokenizer(tokenizer_path(spec, tmp_path))
    at = {piece: 259 + i for i, piece in enumerate(PIECES)}
    assert tokenizer.encode("abc") == [at[" "], at["abc"]]  # "ab", and only then " a"
    assert tokenizer.encode("a") == [at[" a"]]
    assert tokenizer.encode("bc bc") == [at[" "], at["bc"]] * 2
    assert tokenizer.encode("\u00e9\n") == [at[" "], 3 + 0xC3, 3 + 0xA9, 3 + 10]
    for text in ("abc a", " a", "\u4e2d\n", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.added_ids() == ((1,), ()) and tokenizer.eos_token == "</s>"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("cut", "message"), [(20, "too short"), (2000, "ends before the model"), (-9, "of 267 tokens")]
)
def test_a_file_that_is_cut_is_refused(tmp_path, cut, message):
    (tmp_path / "llama2.data").write_bytes(content()[0][:cut])
    with pytest.raises(ValueError, match=f"^data fetch: llama2.data .*{message}"):
        write_hf_folder(tmp_path)
