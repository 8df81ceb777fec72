"""Export: what is written reads back to the same bits and the same model, or it is refused."""

import dataclasses
import json

import flax.linen as nn
import jax
import make_gpt2_fixture
import make_hf_fixtures as fixture
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.cli.main import main
from gpt_jax.convert import export_run as exporting
from gpt_jax.convert import verify
from gpt_jax.convert.export_config import hf_config
from gpt_jax.convert.export_run import export_run, hf_tensors
from gpt_jax.convert.import_run import import_run
from gpt_jax.convert.open_model import open_model
from gpt_jax.convert.source import ARCHITECTURES, load_params, model_values
from gpt_jax.convert.table import Rule, linear, vector
from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.lora import merge_lora
from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.runs.checkpoints import save_params


def folder_of(folder, name, dtype=np.float32, **changes):
    """(its spec, its weights): a case as a folder of Hugging Face's, with a tokenizer of bytes."""
    _, config, weights = fixture.stored(name)
    weights = {key: array.astype(dtype) for key, array in weights.items()}
    folder.mkdir(exist_ok=True)
    byte_tokenizer().save(folder / "tokenizer.json")
    return fixture.write_folder(folder, config | changes, weights), weights


def read_folder(folder):
    """The tensors of all files of a folder."""
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= safetensors.numpy.load_file(file)
    return held


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    """(run directory, weights) of a small Llama whose folder says more than its weights."""
    root = tmp_path_factory.mktemp("llama")
    spec, weights = folder_of(root / "hf", "llama")
    (root / "hf" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [256, 7], "bos_token_id": 3, "temperature": 0.6})
    )
    import_run(spec, root / "run")
    return root / "run", weights


# tables


@pytest.mark.parametrize("name", fixture.CASES)
def test_the_tables_undo_themselves(tmp_path, name):
    """Names and bits of the tensors, and the config, of every family and head."""
    spec, weights = folder_of(tmp_path, name)
    values = model_values(spec)
    config = TransformerConfig(**values)
    family, written = hf_config(config, (), name)
    if name == "bert":  # a bare model of ours has no pooler
        weights = {key: array for key, array in weights.items() if "pooler" not in key}
    params = {key: np.asarray(parameter) for key, parameter in load_params(spec, config).items()}
    params = {key: x for key, x in params.items() if name != "bert" or "pooler" not in key}
    tensors = {t.name: t for t in hf_tensors(family, config, params, written)}
    assert all(t.read().shape == t.shape for t in tensors.values())
    assert_same_bits({key: t.read() for key, t in tensors.items()}, weights)
    _, said, _ = fixture.stored(name)
    assert (written["architectures"], written["model_type"]) == (
        said["architectures"], said["model_type"],
    )  # fmt: skip
    assert model_values(fixture.write_folder(tmp_path, written, weights)) == values


def test_every_rule_undoes_itself():
    sizes, rng = {"D": 6, "N": 2, "H": 4}, np.random.default_rng(0)
    rules = [
        Rule(("D",), ("N", "H")), linear(("D",), ("N", "H")), linear(("N", "H"), ("D",)),
        vector("N", "H"), dataclasses.replace(linear(("D",), ("N", "H")), interleaved=True),
    ]  # fmt: skip
    for rule in rules:
        theirs = rng.standard_normal(rule.their_shape(sizes))
        back = rule.to_theirs([rule.to_ours(theirs, sizes)], sizes)
        np.testing.assert_array_equal(back, theirs)
    parts = [Rule(("D",), ("N", "H"), part=(k, 3)) for k in range(3)]
    theirs = rng.standard_normal(parts[0].their_shape(sizes))
    ours = [part.to_ours(theirs, sizes) for part in parts]
    np.testing.assert_array_equal(parts[0].to_theirs(ours, sizes), theirs)


def test_every_family_that_is_read_is_written():
    assert all(family.to_config for family in ARCHITECTURES.values())


BASE = dict(vocab_size=320, seq_len=64, num_layers=2, embed_dim=64, num_heads=4, norm_eps=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"nearest, Qwen3ForCausalLM, would have activation 'swiglu' \(not 'relu2'\)$"),
        ({"activation": "swiglu", "qk_norm": False, "positions": "none"}, r"positions 'rotary'"),
        ({"activation": "swiglu", "qk_norm": False, "logit_softcap": 30.0}, r"logit_softcap 0\.0"),
        ({"activation": "swiglu", "read_prompts_whole": True}, r"read_prompts_whole False \(not"),
        ({"activation": "swiglu", "norm": "layernorm"}, r"norm 'rmsnorm' \(not 'layernorm'\)"),
        (
            {"family": "encoder", "head": "sequence", "num_classes": 2, "pool": "mean",
             "positions": "learned", "norm": "layernorm", "norm_order": "post", "bias": True,
             "activation": "gelu_exact", "embed_norm": True, "num_token_types": 2,
             "qk_norm": False},
            r"nearest, BertForSequenceClassification, would have pool 'pooler' \(not 'mean'\)$",
        ),
        (
            {"family": "encoder_decoder", "positions": "relative", "activation": "relu",
             "qk_norm": False, "scale_attention": False, "tied": True, "start_id": 0},
            r"nearest, T5ForConditionalGeneration, would have scale_logits True \(not False\)$",
        ),
    ],
)  # fmt: skip
def test_a_model_that_no_family_has_is_refused_by_its_fields(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        hf_config(TransformerConfig(**BASE | changes), (), "'runs/x'")
    assert str(error.value).startswith("--from: 'runs/x' is a model that no family")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Qwen3ForCausalLM"),
        ({"qk_norm": False}, "LlamaForCausalLM"),
        ({"qk_norm": False, "window": 16}, "MistralForCausalLM"),
        ({"qk_norm": False, "qkv_bias": True, "tied": True}, "Qwen2ForCausalLM"),
        ({"window": 16, "global_layers": (0,)}, "Qwen3ForCausalLM"),
        ({"qk_norm": False, "unrotated_layers": (1,)}, "SmolLM3ForCausalLM"),
        # How it is computed or was trained does not matter.
        ({"scan": True, "dropout": 0.1, "init": "gpt2", "dtype": "bfloat16"}, "Qwen3ForCausalLM"),
    ],
)
def test_models_of_our_own_find_their_family(changes, name):
    config = TransformerConfig(**BASE | {"activation": "swiglu"} | changes)
    assert hf_config(config, (), "it")[1]["architectures"] == [name]


# folders


def test_a_run_becomes_the_folder_it_is_from(llama_run, tmp_path):
    run, weights = llama_run
    before = sorted(tmp_path.iterdir())
    folder, values = export_run(str(run), tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == [*before, folder]
    assert_same_bits(read_folder(folder), weights)
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    # Both spellings.
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 1e5
    assert values["dtype"] == values["torch_dtype"] == "float32"
    said = json.loads((folder / "generation_config.json").read_text())
    assert said == {"eos_token_id": [256, 7], "bos_token_id": 3, "pad_token_id": 256,
                    "temperature": 0.6}  # fmt: skip
    for spec in (f"hf:{folder}", str(run)):  # a folder and its run are opened alike
        opened = open_model(spec)
        assert (opened.eos_ids, opened.prefix_ids, opened.suffix_ids) == ((256, 7), (), ())
        assert opened.generation["temperature"] == 0.6


def test_bfloat16_and_shards_and_gguf_like_sources(tmp_path):
    spec, weights = folder_of(tmp_path / "in", "t5_v1_0", ml_dtypes.bfloat16)
    limit = max(array.nbytes for array in weights.values()) * 3
    folder, values = export_run(spec, tmp_path / "out", dtype="bfloat16", shard_size=limit)
    assert_same_bits(read_folder(folder), weights)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    assert set(index["weight_map"]) == set(weights)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = safetensors.numpy.load_file(file)
        assert sum(array.nbytes for array in held.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in held)
    assert values["dtype"] == "bfloat16" and values["decoder_start_token_id"] == 0
    assert model_values(f"hf:{folder}") == model_values(spec)


def test_gpt2_goes_through_a_run(tmp_path):
    """Its products hold queries, keys and values side by side."""
    size = make_gpt2_fixture.SMALL
    weights = {
        f"transformer.{name}": array.astype(np.float32)
        for name, array in make_gpt2_fixture.weights(size, 3).items()
    }
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": size.embed_dim,
        "n_head": size.num_heads, "n_layer": size.num_layers, "n_positions": size.seq_len,
        "vocab_size": size.vocab_size,
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    byte_tokenizer().save(tmp_path / "in" / "tokenizer.json")
    import_run(fixture.write_folder(tmp_path / "in", config, weights), tmp_path / "run")
    folder, _ = export_run(str(tmp_path / "run"), tmp_path / "out")
    assert_same_bits(read_folder(folder), weights)


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_are_merged(llama_run, tmp_path, scan):
    source, _ = llama_run
    run = tmp_path / "run"
    run.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["model"] |= {"lora_rank": 2, "scan": scan}
    (run / "config.json").write_text(json.dumps(config))
    (run / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    model_config = TransformerConfig(**config["model"])
    model = Transformer(model_config)
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.standard_normal(x.shape, np.float32)), shapes
    )
    save_params(run / "checkpoints", params, {"data": {}})
    folder, _ = export_run(str(run), tmp_path / "hf")
    held = read_folder(folder)
    merged = trees.flatten(merge_lora(model_config, params)[1])
    name = "stack/layers/attention/q/kernel"
    kernel = merged[name][1] if scan else merged[name.replace("layers", "layers_1")]
    theirs = held["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(theirs, np.asarray(kernel).reshape(64, -1).T)
    assert not any("lora" in key for key in held)


def test_a_failed_export_leaves_nothing_and_harms_nothing(llama_run, tmp_path, monkeypatch):
    run, _ = llama_run
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"^--to: .*full' is not empty"):
        export_run(str(run), full)
    empty = tmp_path / "empty"
    empty.mkdir()

    def fails(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(exporting, "write_tokenizer", fails)
        export_run(str(run), empty)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "full", "mine"]
    export_run(str(run), empty)
    assert (empty / "config.json").exists() and (full / "mine").read_text() == "mine"


def test_what_a_run_s_tokenizer_says(tmp_path, llama_run, monkeypatch):
    """Our own models read the end-of-text token first; a chat template goes along."""
    run, _ = llama_run
    opened = open_model(str(run))
    own = dataclasses.replace(
        opened, prefix_ids=(256,), generation={}, eos_ids=(256,),
        tokenizer=byte_tokenizer(("<|im_start|>", "<|im_end|>")),
        chat_template=dataclasses.replace(CHATML, name="the run's"),
    )  # fmt: skip
    monkeypatch.setattr(exporting, "open_model", lambda *_, **__: own)
    folder, values = export_run("runs/own", tmp_path / "hf")
    assert values["bos_token_id"] == values["pad_token_id"] == 256
    assert values["eos_token_id"] == [256, 258]  # the end of a turn too
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 512
    assert settings["eos_token"] == settings["bos_token"] == "<|endoftext|>"
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    again = open_model(f"hf:{folder}")
    assert (again.prefix_ids, again.suffix_ids, again.eos_ids) == ((256,), (), (256, 258))
    assert again.tokenizer.encode("a b") == own.tokenizer.encode("a b")
    assert again.chat_template.source == CHATML.source
    assert ChatTemplate.load(folder).tokens["eos_token"] == "<|endoftext|>"


# the command


def converted(*arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", *map(str, arguments)])
    return exit_info.value.code


def test_the_command(llama_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, weights = llama_run
    to = f"--to=hf:{tmp_path / 'hf'}"
    assert converted(f"--from={run}", to, "--dtype=bfloat16", "--shard_size=100KB") == 0
    assert "LlamaForCausalLM, bfloat16" in capsys.readouterr().out
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert read_folder(tmp_path / "hf").keys() == weights.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=hf:{}/x", "--shard_size=5Go"], "--shard_size: '5Go' is no size such as 5GB"),
        (["--to=hf:"], "--to: 'hf:' names no folder"),
        (["--to={}/x", "--verify"], "--verify: transformers is asked to read folders alone"),
        (["--to={}/x", "--dtype=bfloat16"], "--dtype: bfloat16 is only for --to=hf:DIR"),
        (["--to=hf:{}/x", "--skip=head"], "--skip: ['head'] is only for a run directory"),
        (["--to=hf:{}/x", "--step=7"], "step: 7 is not among the saved steps"),
    ],
)
def test_mistakes_are_told_in_one_line(llama_run, tmp_path, capsys, arguments, message):
    run, _ = llama_run
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert converted(f"--from={run}", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_transformers_nothing_is_written(llama_run, tmp_path, capsys, monkeypatch):
    run, _ = llama_run
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert converted(f"--from={run}", f"--to=hf:{tmp_path}/x", "--verify") == 2
    assert "--verify: compares with transformers, but torch and transformers is" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
