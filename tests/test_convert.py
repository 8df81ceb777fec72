"""Import tables and readers: what is in a file is used or named, what we cannot represent is
refused, and the spellings of both transformers and of GGUF give the same parameters."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import warnings

import make_hf_fixtures as fixture
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.merge import merge_strict
from gpt_jax.convert.source import ARCHITECTURES, Source, check_same, load_params, model_values
from gpt_jax.models.config import TransformerConfig


def read(spec):
    params = load_params(spec, TransformerConfig(**model_values(spec)))
    return {name: np.asarray(parameter) for name, parameter in params.items()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture
def llama(tmp_path):
    """(folder, config, weights, parameters) of a small Llama."""
    _, config, weights = fixture.stored("llama")
    return tmp_path, config, weights, read(fixture.write_folder(tmp_path, config, weights))


def test_a_source_starts_no_jax():
    code = "import gpt_jax.convert.source, sys; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=fixture.DATA.parent.parent).returncode == 0
    )


def test_layers_are_stacked_and_products_lie_as_inputs_outputs(llama):
    _, _, weights, params = llama
    q = params["stack/layers/attention/q/kernel"]  # [L, D, N, H]
    theirs = weights["model.layers.1.self_attn.q_proj.weight"]  # (N H, D)
    assert q.shape == (2, 64, 4, 16)
    np.testing.assert_array_equal(q[1, :, 3, 5], theirs[3 * 16 + 5])
    out = params["stack/layers/attention/out/kernel"]  # [L, N, H, D]
    theirs = weights["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(out[0, 2, 7], theirs[:, 2 * 16 + 7])


def test_shards_and_bfloat16_read_as_the_whole(llama, tmp_path):
    _, config, weights, params = llama
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(read(f"hf:{folder}"), params)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is missing"):
        read(f"hf:{folder}")

    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    whole = {name: array.astype(np.float32) for name, array in half.items()}
    spec = fixture.write_folder(tmp_path, config, whole)
    expected = read(spec)
    assert_same(read(fixture.write_folder(tmp_path, config, half)), expected)
    assert all(array.dtype == np.float32 for array in expected.values())


def test_both_spellings_of_a_config_read_alike(llama):
    folder, config, weights, _ = llama
    new = model_values(f"hf:{folder}")
    old = dict(config, rope_theta=config["rope_parameters"]["rope_theta"], rope_scaling=None)
    old.pop("rope_parameters")
    assert model_values(fixture.write_folder(folder, old, weights)) == new
    assert new["rope_theta"] == 1e5
    # transformers 4 says of T5 v1.1 that its head is not tied, and nothing of scaling.
    _, config, weights = fixture.stored("t5_v1_1")
    with warnings.catch_warnings():
        # transformers 5 says "tied" of v1.1 too: that its head is its own is no surprise.
        warnings.simplefilter("error")
        new = model_values(fixture.write_folder(folder, config, weights))
    assert config["tie_word_embeddings"] is True
    assert config.pop("scale_decoder_outputs") is False
    old = dict(config, tie_word_embeddings=False)
    assert model_values(fixture.write_folder(folder, old, weights)) == new
    assert (new["tied"], new["scale_logits"], new["activation"]) == (False, False, "geglu")


def values_of(name, **changes):
    """Fields of a case's model, some values of its config.json being others or (None) absent."""
    _, config, _ = fixture.stored(name)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    return ARCHITECTURES[config["architectures"][0]].values(HFConfig(config, "config.json"))


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("qwen2", {"layer_types": None}),  # max_window_layers says the same
        ("gemma2", {"layer_types": None}),
        (
            "gemma3",
            {
                "layer_types": None, "sliding_window_pattern": 3, "rope_parameters": None,
                "rope_theta": 1e5, "rope_local_base_freq": 1e3,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        ),
        (
            "llama3",
            {
                "rope_parameters": None, "rope_theta": 1e4,
                "rope_scaling": {
                    "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                },
            },
        ),
        ("llama_yarn", {"original_max_position_embeddings": 128}),
        ("gemma", {"hidden_act": "gelu"}),
        ("smollm3", {"no_rope_layers": None}),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}),
    ],
)  # fmt: skip
def test_layers_are_told_alike_by_both_spellings(name, old):
    assert values_of(name, **old) == values_of(name)


def test_windows_are_those_of_the_layers():
    assert values_of("mistral")["window"] == 48 and values_of("mistral")["global_layers"] == ()
    assert values_of("mistral", sliding_window=None)["window"] == 4096  # absent: the default
    assert values_of("qwen2")["global_layers"] == (0, 1)
    for off in ({"use_sliding_window": False}, {"layer_types": ["full_attention"] * 4}):
        assert values_of("qwen2", **off)["window"] == 0
    assert values_of("gemma2")["global_layers"] == (1, 3)
    gemma3 = values_of("gemma3")
    assert (gemma3["global_layers"], gemma3["rope_local_theta"]) == ((2,), 1e3)
    assert gemma3["score_width"] == 40 and values_of("gemma")["score_width"] == 0
    # What a run's config.json keeps is read back as it was.
    config = TransformerConfig(**gemma3)
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    kept["lora_targets"] = config.lora_targets
    assert TransformerConfig(**kept) == config
    check_same(kept, config, "there")
    with pytest.raises(ValueError, match=r"^model\.rope_scaling: .*factor=2.0.* there has .*4.0"):
        scaling = dataclasses.replace(config.rope_scaling, factor=2.0)
        check_same(kept, dataclasses.replace(config, rope_scaling=scaling), "there")


def test_a_decoder_without_a_head_is_a_model_of_its_outputs(tmp_path):
    _, config, weights = fixture.stored("llama")
    weights = {name.removeprefix("model."): x for name, x in weights.items() if "head" not in name}
    config["architectures"] = ["LlamaModel"]
    spec = fixture.write_folder(tmp_path, config, weights)
    assert model_values(spec)["head"] == "none" and "head" not in read(spec)


def test_older_spellings_of_names_and_buffers_are_known(tmp_path):
    _, config, weights = fixture.stored("bert_mlm")
    expected = read(fixture.write_folder(tmp_path, config, weights))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in weights.items()
    }
    assert old.keys() != weights.keys()
    old["bert.embeddings.position_ids"] = np.arange(96)[None]
    old["cls.seq_relationship.weight"] = np.zeros((2, 64), np.float32)
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].copy()
    assert_same(read(fixture.write_folder(tmp_path, config, old)), expected)
    old["cls.predictions.decoder.weight"][5, 5] += 1
    with pytest.raises(ValueError, match=r"no place: cls\.predictions\.decoder\.weight"):
        read(fixture.write_folder(tmp_path, config, old))


def test_the_head_is_tied_if_the_file_and_the_config_say_so(llama):
    folder, config, weights, params = llama
    assert not model_values(f"hf:{folder}")["tied"] and "head" in params
    tied = dict(config, tie_word_embeddings=True)
    # A head that differs is kept, and said; a copy and none are the same.
    spec = fixture.write_folder(folder, tied, weights)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is not the embedding"):
        assert_same(read(spec), params)
    headless = {name: array for name, array in weights.items() if name != "lm_head.weight"}
    spec = fixture.write_folder(folder, tied, headless)
    without = read(spec)
    assert model_values(spec)["tied"] and "head" not in without
    copy = headless | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    spec = fixture.write_folder(folder, tied, copy)
    assert model_values(spec)["tied"]
    assert_same(read(spec), without)
    # An untied head stays one even where it is equal.
    assert "head" in read(fixture.write_folder(folder, config, copy))


def test_encoder_and_decoder_of_t5_may_differ_in_depth(tmp_path):
    _, config, weights = fixture.stored("t5_v1_0")
    config["num_decoder_layers"] = 1
    weights = {name: x for name, x in weights.items() if not name.startswith("decoder.block.1")}
    spec = fixture.write_folder(tmp_path, config, weights)
    params = read(spec)
    assert params["stack/layers/cross_attention/v/kernel"].shape == (1, 64, 4, 24)
    assert params["encoder/layers/attention/v/kernel"].shape == (2, 64, 4, 24)
    # The encoder alone is a model of one stack.
    half = {name: x for name, x in weights.items() if not name.startswith("decoder")}
    alone = read(
        fixture.write_folder(tmp_path, config | {"architectures": ["T5EncoderModel"]}, half)
    )
    np.testing.assert_array_equal(alone["relative"], params["encoder_relative"])
    assert alone["stack/layers/mlp/up/kernel"].shape == (2, 64, 160)


def test_missing_unused_and_misshapen_tensors_are_named(llama):
    folder, config, weights, _ = llama
    changed = dict(weights, extra=np.zeros(3, np.float32))
    changed.pop("model.layers.1.mlp.up_proj.weight")
    spec = fixture.write_folder(folder, config, changed)
    with pytest.raises(
        ValueError, match=r"missing: layers\.1\.mlp\.up_proj\.weight; .*no place: extra$"
    ):
        read(spec)
    changed.pop("extra")
    with pytest.raises(ValueError, match=r"missing: layers\.1\.mlp\.up_proj.* no place: none$"):
        read(fixture.write_folder(folder, config, changed))
    name = "model.layers.1.self_attn.k_proj.weight"
    spec = fixture.write_folder(folder, config, weights | {name: weights[name][:16]})
    with pytest.raises(ValueError, match=r"k_proj\.weight is \[16, 64\], but .* \[32, 64\]"):
        read(spec)
    spec = fixture.write_folder(folder, config, weights | {name: weights[name].astype(np.int8)})
    with pytest.raises(ValueError, match=r"k_proj\.weight is I8, not one of"):
        read(spec)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_sc.*dynamic.*yarn"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "a number as factor"),
        ("llama", {"sliding_window": 256}, "sliding_window 256 .*512"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types .*only one type"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types .*4 in all"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'.*only"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu' .*silu"),
        ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ("llama", {"rms_norm_eps": -1.0}, "model.norm_eps: -1.0"),
        ("llama", {"num_key_value_heads": 3}, "model.num_kv_heads: 3"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "float: 'x'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"architectures": ["PhiForCausalLM"]}, "'PhiForCausalLM' .*LlamaForCausalLM"),
        ("llama", {"architectures": None, "model_type": "mamba"}, "model_type 'mamba' .*llama"),
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder True"),
        ("bert", {"hidden_act": "swish"}, "hidden_act 'swish' .*gelu_new"),
        ("t5_v1_0", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj 'gated-relu'"),
    ],
)
def test_what_we_cannot_represent_is_refused(tmp_path, name, changes, message):
    _, config, weights = fixture.stored(name)
    spec = fixture.write_folder(tmp_path, config | changes, weights)
    with pytest.raises(ValueError, match=message) as error:
        model_values(spec)
    assert str(error.value).startswith(f"init.source: {tmp_path}/config.json: ")


def test_a_window_as_long_as_the_model_hides_nothing(llama):
    folder, config, weights, params = llama
    assert_same(
        read(fixture.write_folder(folder, config | {"sliding_window": 512}, weights)), params
    )


def test_a_config_that_computes_something_else_is_refused(llama):
    folder, *_ = llama
    values = model_values(f"hf:{folder}")
    longer = TransformerConfig(**{**values, "seq_len": 1024, "dropout": 0.1, "init": "fan_in"})
    check_same(values, longer, "there")
    wrong = dataclasses.replace(longer, norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"^model\.norm_eps: 1e-05 .* hf:.* has 1e-06$"):
        load_params(f"hf:{folder}", wrong)
    with pytest.raises(ValueError, match=r"^model\.family: 'encoder' in the config"):
        check_same(values, dataclasses.replace(longer, family="encoder"), "there")


def test_pickles_are_refused(llama):
    folder, *_ = llama
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*save the model as"):
        read(f"hf:{folder}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "names no path"),
        ("hf:gpt2-of-nowhere", "no folder with a config.json.*nothing is downloaded"),
        ("gguf:nowhere.gguf", "is no file"),
        ("nowhere", "no run directory; give one, hf:DIR or gguf:FILE"),
    ],
)
def test_a_source_that_is_not_there_is_named(spec, message):
    with pytest.raises(ValueError, match=f"^init.source: .*{message}"):
        model_values(spec)


def test_a_folder_of_hugging_face_s_is_not_taken_for_a_run(llama):
    folder, *_ = llama
    with pytest.raises(ValueError, match=f"write 'hf:{folder}'"):
        Source.parse(str(folder))


# strict loading


def shaped(**shapes):
    return {name.replace("__", "/"): np.zeros(shape) for name, shape in shapes.items()}


def test_loading_is_strict_on_both_sides():
    loaded = shaped(tokens=(5, 4), mlm__bias=(5,), stack__layers__x=(2, 4))
    wanted = shaped(tokens=(5, 4), classifier__bias=(3,), stack__layers__x=(2, 4))
    with pytest.raises(ValueError) as error:
        merge_strict(loaded, wanted, (), "hf:DIR")
    message = str(error.value)
    assert message.startswith("init.skip: hf:DIR lacks of the model's parameters: classifier/bias;")
    assert "no place for its: mlm/bias." in message
    assert message.endswith("['^classifier/', '^mlm/']")
    # What the message says to write is right.
    skip = ("^classifier/", "^mlm/")
    used, new = merge_strict(loaded, wanted, skip, "hf:DIR")
    assert sorted(used) == ["stack/layers/x", "tokens"] and new == ["classifier/bias"]
    # What is skipped starts anew although the source has it.
    used, new = merge_strict(loaded, wanted, (*skip, "x$"), "hf:DIR")
    assert sorted(used) == ["tokens"] and new == ["classifier/bias", "stack/layers/x"]
    with pytest.raises(ValueError, match=r"init\.skip: 'clasifier' matches no parameter"):
        merge_strict(loaded, wanted, (*skip, "clasifier"), "hf:DIR")
    with pytest.raises(ValueError, match=r"init\.skip: '\[' is no regular expression"):
        merge_strict(loaded, wanted, (*skip, "["), "hf:DIR")


@pytest.mark.parametrize(
    ("name", "found", "expected", "message"),
    [
        (
            "tokens",
            (5, 4),
            (7, 4),
            r"^model.vocab_size: .*\[5, 4\].*\[7, 4\]: give 5, the source's",
        ),
        ("head", (4, 5), (4, 7), "^model.vocab_size: .*give 5.*adding \\['\\^head\\$'\\]"),
        ("positions", (9, 4), (8, 4), "^model.seq_len: .*give 9;"),
        ("classifier/kernel", (4, 3), (4, 2), "^model.num_classes: .*give 3;.*'\\^classifier/'"),
        ("tokens", (5, 8), (5, 4), r"^init.source: there: tokens is \[5, 8\].*\[5, 4\]$"),
        ("stack/layers/x", (2, 4), (3, 4), r"^init.source: .*stack/layers/x is \[2, 4\]"),
    ],
)
def test_another_shape_is_named(name, found, expected, message):
    with pytest.raises(ValueError, match=message):
        merge_strict({name: np.zeros(found)}, {name: np.zeros(expected)}, (), "there")


def test_no_fixture_is_large():
    sizes = {path.name: path.stat().st_size for path in pathlib.Path(fixture.DATA).glob("*.npz")}
    assert len(sizes) > 8 and max(sizes.values()) < 150_000
