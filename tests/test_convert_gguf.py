"""GGUF files, and tokenizers made of what a source holds."""

import json

import gguf
import make_hf_fixtures as fixture
import numpy as np
import pytest
import tokenizers

from gpt_jax.convert.import_run import import_run
from gpt_jax.convert.source import load_params, model_values, tokenizer_path
from gpt_jax.models.config import TransformerConfig
from gpt_jax.runs import canonical
from gpt_jax.runs.run import open_run


def read(spec):
    params = load_params(spec, TransformerConfig(**model_values(spec)))
    return {name: np.asarray(parameter) for name, parameter in params.items()}


@pytest.fixture
def llama(tmp_path):
    """(its source, config, weights) of a small Llama."""
    _, config, weights = fixture.stored("llama")
    return fixture.write_folder(tmp_path, config, weights), config, weights


def write_gguf(path, config, weights, *, kind=gguf.GGMLQuantizationType.F32, **metadata):
    """A Llama as llama.cpp's converter lays it out: rotary pairs of queries and keys adjacent."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for a, b in layer.items()}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "k_proj")):
            halves = array.reshape(-1, 2, 8, array.shape[-1])  # heads of 16
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{names[module]}.weight", data, raw_dtype=kind)
        else:
            writer.add_tensor(f"{names[module]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"gguf:{path}"


def test_a_gguf_gives_the_parameters_of_its_hugging_face_form(llama, tmp_path):
    hf, config, weights = llama
    params = read(hf)
    spec = write_gguf(tmp_path / "whole.gguf", config, weights)
    assert model_values(spec) == model_values(hf)
    ours = read(spec)
    assert ours.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    spec = write_gguf(tmp_path / "q8.gguf", config, weights, kind=gguf.GGMLQuantizationType.Q8_0)
    rounded = read(spec)
    for name, array in params.items():
        assert np.abs(rounded[name] - array).max() < np.abs(array).max() / 100, name
    assert (rounded["tokens"] != params["tokens"]).any()


def test_a_gguf_we_cannot_represent_is_refused(llama, tmp_path, monkeypatch):
    _, config, weights = llama
    scaled = write_gguf(
        tmp_path / "scaled.gguf", config, weights,
        rope_scaling_type=gguf.RopeScalingType.YARN,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rope_scaling .*yarn"):
        model_values(scaled)
    halved = write_gguf(
        tmp_path / "halved.gguf", config, weights,
        rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=2.0,
    )  # fmt: skip
    assert model_values(halved)["rope_scaling"]["factor"] == 2.0
    part = write_gguf(tmp_path / "part.gguf", config, weights, rope_dimension_count=8)
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5"):
        model_values(part)
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count", lambda writer, count: None)
    headless = write_gguf(tmp_path / "headless.gguf", config, weights)
    with pytest.raises(ValueError, match=r"^init\.source: \S*headless\.gguf: a value is of a kind"):
        model_values(headless)
    (tmp_path / "no.gguf").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"no\.gguf is no GGUF file"):
        model_values(f"gguf:{tmp_path / 'no.gguf'}")


_TEXT = "don't count 1234 low lower<|im_end|>\n"


def small_bpe():
    """A byte-level BPE with three merges."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([_TEXT], vocab_size=259, min_frequency=1, show_progress=False)
    return tokenizer


def test_the_tokenizer_of_a_gguf(llama, tmp_path):
    _, config, weights = llama
    base = json.loads(small_bpe().to_str())["model"]
    # A merge that the splitting of digits must keep from being used.
    tokens = [*sorted(base["vocab"], key=base["vocab"].get), "12", "<|im_end|>", "<tool>"]
    merges = [*(" ".join(pair) for pair in base["merges"]), "1 2"]
    kinds = [1] * (len(tokens) - 2) + [3, 4]
    spec = write_gguf(
        tmp_path / "model.gguf", config, weights, tokenizer_model="gpt2", tokenizer_pre="smollm",
        token_list=tokens, token_types=kinds, token_merges=merges,
        chat_template="{{ messages }}",
    )  # fmt: skip
    path = tokenizer_path(spec, tmp_path / "cache")
    assert path.parent.joinpath("chat_template.jinja").read_text() == "{{ messages }}"
    ours = tokenizers.Tokenizer.from_file(str(path))
    ids = ours.encode(_TEXT).ids
    assert ours.decode(ids, skip_special_tokens=False) == _TEXT
    assert ids.count(tokens.index("<|im_end|>")) == 1
    assert "<|im_end|>" not in ours.decode(ids)  # a special token
    assert [tokens[i] for i in ids if tokens[i].strip("Ġ").isdigit()] == ["1", "2", "3", "4"]
    assert ours.encode("a<tool>").ids[-1] == tokens.index("<tool>")
    assert "<tool>" in ours.decode(ours.encode("<tool>").ids)  # a token, but no special one

    spec = write_gguf(
        tmp_path / "other.gguf", config, weights, tokenizer_model="gpt2", tokenizer_pre="gemma"
    )
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre 'gemma' .* gpt-2, smollm"):
        tokenizer_path(spec, tmp_path / "cache")


def test_the_tokenizer_of_a_hugging_face_folder(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer\.json, no vocab\.txt"):
        tokenizer_path(f"hf:{folder}", cache)
    small_bpe().save_model(str(folder))  # vocab.json, merges.txt
    with pytest.warns(UserWarning, match=r"made of vocab\.json and merges\.txt"):
        path = tokenizer_path(f"hf:{folder}", cache)
    ids = small_bpe().encode(_TEXT).ids
    assert tokenizers.Tokenizer.from_file(str(path)).encode(_TEXT).ids == ids
    # Special tokens are told as texts, with properties, and in lists.
    one, two = "lo", "Z"
    told = {"eos_token": {"content": one, "lstrip": False}, "additional_special_tokens": [two]}
    (folder / "special_tokens_map.json").write_text(json.dumps(told))
    with pytest.warns(UserWarning, match=r"made of vocab\.json and merges\.txt"):
        made = tokenizers.Tokenizer.from_file(str(tokenizer_path(f"hf:{folder}", cache)))
    assert {t.content for t in made.get_added_tokens_decoder().values()} == {one, two}

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er", "Low"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.warns(UserWarning, match=r"made of vocab\.txt"):
        path = tokenizer_path(f"hf:{folder}", cache)
    encoded = tokenizers.Tokenizer.from_file(str(path)).encode("Low lower")
    assert encoded.tokens == ["[CLS]", "Low", "low", "##er", "[SEP]"]
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_path(f"hf:{folder}", cache) == folder / "tokenizer.json"


def test_a_gguf_becomes_a_run(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    hf, config, weights = llama
    base = json.loads(small_bpe().to_str())["model"]
    tokens = ["<|endoftext|>", *sorted(base["vocab"], key=base["vocab"].get)]
    source = write_gguf(
        tmp_path / "model.gguf", config, weights, tokenizer_model="gpt2", tokenizer_pre="gpt-2",
        token_list=tokens, token_types=[3] + [1] * (len(tokens) - 1),
        token_merges=[" ".join(pair) for pair in base["merges"]], chat_template="{{ messages }}",
    )  # fmt: skip
    to = tmp_path / "run"
    with pytest.raises(ValueError, match=r"^init\.skip: 'nothing' matches no parameter"):
        import_run(source, to, ("nothing",))
    assert not to.exists()
    import_run(source, to)
    run = open_run(to)
    assert run.step == 0 and run.config.objective.name == "causal_lm"
    assert run.tokenizer.decode(run.tokenizer.encode(_TEXT)) == _TEXT
    assert (to / "chat_template.jinja").read_text() == "{{ messages }}"
    expected = read(hf)
    arrays = canonical.stack(run.params)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    with pytest.raises(ValueError, match=r"^--to: .* is not empty"):
        import_run(source, to)
    with pytest.raises(ValueError, match=r"^--from: .* is a run already"):
        import_run(str(to), tmp_path / "other")


def test_only_a_language_model_becomes_a_run(tmp_path):
    _, config, weights = fixture.stored("bert_span")
    spec = fixture.write_folder(tmp_path, config, weights)
    with pytest.raises(ValueError, match=r"^--from: .*head 'span', no language model"):
        import_run(spec, tmp_path / "run")
