"""Opening a model wherever it is from, tensor by tensor; and files that are not as they should."""

import json
import subprocess
import sys

import jax
import make_hf_fixtures as fixture
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from jax.sharding import PartitionSpec
from test_convert_gguf import write_gguf
from test_export import folder_of

from gpt_jax.convert import placing
from gpt_jax.convert.export_run import export_run
from gpt_jax.convert.import_run import import_run
from gpt_jax.convert.open_model import held_as, open_model
from gpt_jax.convert.source import load_params, model_values
from gpt_jax.convert.tensors import SafeTensors
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.quantize import is_bfloat16, num_bytes
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs import canonical, leaf_digests
from gpt_jax.runs.state import abstract_on_mesh

# what is opened


def test_a_folder_is_opened_by_its_path_alone_and_says_how_it_is_used(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er"]
    spec, _ = folder_of(
        tmp_path / "bert", "bert_sequence", id2label={"0": "bad", "1": "so so", "2": "good"}
    )
    (tmp_path / "bert" / "tokenizer.json").unlink()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    with pytest.warns(UserWarning, match=r"made of vocab\.txt"):
        opened = open_model(str(tmp_path / "bert"))
    assert opened.name == "bert" and opened.labels == ("bad", "so so", "good")
    assert (opened.prefix_ids, opened.suffix_ids) == ((2,), (3,))
    assert opened.chat_template is None
    with pytest.warns(UserWarning):
        same = open_model(spec)
    jax.tree.map(np.testing.assert_array_equal, opened.params, same.params)


def test_several_ends_and_a_template(tmp_path):
    spec, _ = folder_of(tmp_path / "chat", "llama", eos_token_id=5)
    assert open_model(spec).eos_ids == (5,)
    # The default of a class, whose vocabulary is another.
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": 128001}')
    assert open_model(spec).eos_ids == (256,)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    opened = open_model(spec)
    assert opened.eos_ids == (256, 7) and opened.chat_template.source == "{{ messages }}"
    with pytest.raises(ValueError, match=r"^step: 3 is for run directories; 'hf:"):
        open_model(spec, step=3)
    with pytest.raises(ValueError, match=r"^spec: 'nowhere' is no run directory"):
        open_model("nowhere")
    with pytest.raises(ValueError, match=r"^--draft: 'nowhere' is no run directory"):
        open_model("nowhere", field="--draft")


def test_weights_are_held_as_asked(tmp_path):
    spec, _ = folder_of(tmp_path / "llama", "llama")
    opened = open_model(spec)
    assert held_as(opened, "float32") is opened
    half, small = held_as(opened, "bfloat16"), held_as(opened, "int8")
    assert half.model.config.dtype == "bfloat16" and is_bfloat16(half.params)
    assert small.model == opened.model
    assert num_bytes(small.params) < num_bytes(half.params) < num_bytes(opened.params)
    with pytest.raises(ValueError, match=r"^dtype: 'float16' is none of float32, bfloat16, int8$"):
        held_as(opened, "float16")


HOSTILE = {
    "config.json": ("", "5", "[" * 9999, '{"architectures": [5]}', b"\xff"),
    "generation_config.json": ("{", "[1]", "null", "[" * 9999, b"\xff"),
    "tokenizer_config.json": ("{", "[" * 9999, '{"chat_template": 5}'),
    "tokenizer.json": ("", "[]", b"\xff"),
    "model.safetensors.index.json": ("{", "null", "[" * 9999),
    "model.safetensors": (b"", (2**62).to_bytes(8, "little") + b"{}"),
}
VALUES = {
    "rope_scaling": "x", "id2label": [1], "hidden_act": ["silu"], "sliding_window": "x",
    "num_hidden_layers": 5000, "vocab_size": 10**9, "hidden_size": -1,
}  # fmt: skip


def test_files_of_others_fail_in_a_line_that_names_them(tmp_path):
    spec, _ = folder_of(tmp_path, "llama")
    config = tmp_path / "config.json"
    cases = [(name, text) for name, texts in HOSTILE.items() for text in texts]
    values = json.loads(config.read_text())
    cases += [("config.json", json.dumps(values | {name: VALUES[name]})) for name in VALUES]
    for name, text in cases:
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"^--run: ") as error:
            open_model(spec, field="--run")
        assert str(tmp_path) in str(error.value), (name, text[:50])
        path.unlink() if before is None else path.write_bytes(before)
    open_model(spec)


def test_a_gguf_says_what_ends_a_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    _, config, weights = fixture.stored("llama")
    base = json.loads(byte_tokenizer().json)["model"]["vocab"]
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(base, key=base.get), "ab"]
    spec = write_gguf(
        tmp_path / "model.gguf", config, weights, tokenizer_model="gpt2", tokenizer_pre="gpt-2",
        token_list=tokens, token_types=[3, 3] + [1] * (len(tokens) - 2), token_merges=["a b"],
        eos_token_id=1, chat_template="{{ messages }}",
    )  # fmt: skip
    for opened in (open_model(spec), open_model(str(import_to(spec, tmp_path / "run")))):
        assert opened.eos_ids == (1,)
        assert opened.chat_template.source == "{{ messages }}"
    # And on to Hugging Face's.
    folder, _ = export_run(spec, tmp_path / "hf")
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    assert held.keys() == weights.keys()
    for name, array in held.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def import_to(spec, to):
    import_run(spec, to)
    return to


# placing


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_lie_on_a_mesh_as_they_should(tmp_path, scan, monkeypatch):
    spec, _ = folder_of(tmp_path, "llama")
    config = TransformerConfig(**model_values(spec) | {"scan": scan})
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    like = abstract_on_mesh(Transformer(config), mesh)
    expected = load_params(spec, config)
    reads = []
    read = SafeTensors.read
    monkeypatch.setattr(
        SafeTensors, "read", lambda self, name: (reads.append(name), read(self, name))[1]
    )
    params = placing.place(expected, like)
    assert len(reads) == len(set(reads)) == len(SafeTensors(tmp_path).names())
    split = 0
    for name, array in canonical.stack(params).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
        split += leaf.sharding.spec != PartitionSpec()
    assert split > 5


def test_what_is_skipped_is_not_read(tmp_path, monkeypatch):
    spec, _ = folder_of(tmp_path, "llama")
    params = load_params(spec, TransformerConfig(**model_values(spec)))
    monkeypatch.setattr(SafeTensors, "read", None)
    assert params["tokens"].shape == (320, 64)
    layer = params["stack/layers/attention/q/kernel"][1]
    assert layer.shape == (64, 4, 16) and layer.names == ("layers.1.self_attn.q_proj.weight",)


# files that are not what they should be


@pytest.fixture
def folder(tmp_path):
    """A folder of a small Llama in two shards, and the path of its index."""
    spec, weights = folder_of(tmp_path / "in", "llama")
    size = sum(array.nbytes for array in weights.values()) // 2 + 100_000
    out, _ = export_run(spec, tmp_path / "hf", shard_size=size)
    index = out / "model.safetensors.index.json"
    assert len(list(out.glob("*.safetensors"))) == 2
    return out, index


def change_index(index, **changes):
    values = json.loads(index.read_text())
    values["weight_map"] |= changes
    index.write_text(json.dumps(values))


NORM = "model.norm.weight"


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", 3])
def test_an_index_points_to_no_other_folder(folder, shard):
    out, index = folder
    change_index(index, **{NORM: shard})
    with pytest.raises(ValueError, match=r"json: model\.norm\.weight is said to be in .*no file"):
        SafeTensors(out)


def test_an_index_and_its_shards_must_agree(folder):
    out, index = folder
    first, second = sorted(path.name for path in out.glob("*.safetensors"))
    where = json.loads(index.read_text())["weight_map"]
    other = second if where[NORM] == first else first
    change_index(index, **{NORM: other})
    with pytest.raises(ValueError, match=rf"{other} lacks model\.norm\.weight, though model\."):
        SafeTensors(out)
    change_index(index, **{NORM: "third.safetensors"})
    with pytest.raises(ValueError, match=r"third\.safetensors is missing, though model\."):
        SafeTensors(out)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="holds no weight_map"):
        SafeTensors(out)


def test_a_file_that_is_cut_off_names_the_tensor(folder):
    out, _ = folder
    path = sorted(out.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(
        ValueError, match=rf"{path.name} is cut off: \S+ would end at byte \d+, .* does at \d+$"
    ) as error:
        SafeTensors(out)
    assert str(len(whole) - 1000) in str(error.value)
    # Cut in the header, and headers that claim to be larger than the file, or than memory.
    for data in (whole[:5], whole[:50], (2**62).to_bytes(8, "little") + whole[8:], b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^init\.source: .* is no safetensors file: "):
            SafeTensors(out)


def test_numbers_of_a_kind_we_cannot_read_are_named_before_any_is_read(tmp_path, monkeypatch):
    spec, weights = folder_of(tmp_path, "llama")
    weights[NORM] = weights[NORM].astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(SafeTensors, "read", None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is F8_E4M3, not one of F64, F32"):
        load_params(spec, TransformerConfig(**model_values(spec)))


# memory


def test_digests_are_the_same_whether_an_array_is_hashed_whole_or_in_pieces(monkeypatch):
    monkeypatch.setattr(leaf_digests, "_PIECE", 100)
    rng = np.random.default_rng(0)
    shapes = {
        "f4": [(7, 3, 5), (64,), (1, 99), (300, 1), (2, 2)],
        "i4": [(50, 2)],
        "bool": [(333,)],
    }
    arrays = {
        f"{dtype}{shape}": jax.numpy.asarray(rng.integers(-9, 9, shape).astype(dtype))
        for dtype, all_shapes in shapes.items()
        for shape in all_shapes
    }
    arrays |= {"half": arrays["f4(7, 3, 5)"].astype("bfloat16"), "scalar": jax.numpy.float32(3)}
    whole, pieces = leaf_digests.leaf_digests(arrays), leaf_digests.thrifty_leaf_digests(arrays)
    assert whole.keys() == pieces.keys()
    for name in arrays:
        np.testing.assert_array_equal(pieces[name], whole[name], err_msg=name)


_MEASURE = """
import re, sys
import jax
from gpt_jax.convert.import_run import import_run
from gpt_jax.convert.export_run import export_run
from gpt_jax.convert.open_model import open_model
from gpt_jax.parallel.startup import start
import orbax.checkpoint

what, source, to = sys.argv[1:]
start(one_arena=what == "convert")
jax.numpy.zeros(3).block_until_ready()
def peak():
    # Not getrusage's: that one begins with what the parent had.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
if what == "open":
    jax.block_until_ready(open_model(source).params)
else:
    import_run(source, to)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    # A checkpoint is written from a copy of an array and its compressed form.
    ("what", "limit"), [("open", 1.1), ("convert", 1.2)]
)  # fmt: skip
def test_the_peak_is_the_result_and_little_more(tmp_path, what, limit):
    layers, width, hidden, vocab = 12, 768, 2304, 12_000
    rng, shapes = np.random.default_rng(0), {}
    for i in range(layers):
        place = f"model.layers.{i}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{place}.mlp.down_proj.weight": (width, hidden)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{place}.{name}.weight": (width,) for name in norms}
    shapes |= {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 12,
        "vocab_size": vocab, "tie_word_embeddings": True,
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    spec = fixture.write_folder(tmp_path, config, weights)
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    result = sum(array.nbytes for array in weights.values())
    # Of the layers' stacked parameters; a checkpoint keeps those together.
    largest = layers * width * hidden * 4
    del weights
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, what, spec, str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split()[-1])
    print(f"{what}: {growth / 2**20:.0f} MiB for {result / 2**20:.0f} and {largest / 2**20:.0f}")
    assert growth < limit * (result + largest)
