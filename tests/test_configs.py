"""The configs that begin from another model, and the architectures that others published."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import pytest
from conftest import ROOT

from configs import architectures
from gpt_jax.convert import source, table
from gpt_jax.convert.bert import BERT
from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.llama import LLAMA
from gpt_jax.convert.merge import merge_strict
from gpt_jax.convert.source import inherit_model
from gpt_jax.convert.t5 import T5
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.transforms import make_transform, num_positions, special_ids
from gpt_jax.runs import canonical
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.state import abstract_params
from gpt_jax.scaling import counts
from gpt_jax.tasks.table import find_task

# What the published config.json files say, as far as it decides the computation.
BERT_BASE = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "type_vocab_size": 2, "vocab_size": 30522,
}  # fmt: skip
BERT_LARGE = BERT_BASE | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24,
}  # fmt: skip
T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "model_type": "t5", "n_positions": 512,
    "num_heads": 8, "num_layers": 6, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}  # fmt: skip
T5_BASE = T5_SMALL | {"d_ff": 3072, "d_model": 768, "num_heads": 12, "num_layers": 12}
T5_LARGE = T5_SMALL | {"d_ff": 4096, "d_model": 1024, "num_heads": 16, "num_layers": 24}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_V1_1_SMALL = T5_SMALL | V1_1 | {
    "d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8
}  # fmt: skip
T5_V1_1_BASE = T5_BASE | V1_1 | {"d_ff": 2048, "num_decoder_layers": 12}
T5_V1_1_LARGE = T5_LARGE | V1_1 | {"d_ff": 2816, "num_decoder_layers": 24}


def read(family, values, head=()):
    """The fields that the import tables make of a config.json and the names of heads in a file."""
    tensors = types.SimpleNamespace(names=lambda: head, where="model.safetensors")
    return table.model_values(family, HFConfig(values, "config.json"), tensors)


# Ours, theirs, the family, and the parameters that the published model has.
PUBLISHED = {
    "bert-base": (architectures.bert(), BERT_BASE, BERT, 109_514_298),
    "bert-large": (architectures.bert(24, 1024, 16), BERT_LARGE, BERT, 335_174_458),
    "t5-small": (architectures.t5("small", "1.0"), T5_SMALL, T5, 60_506_624),
    "t5-base": (architectures.t5("base", "1.0"), T5_BASE, T5, 222_903_552),
    "t5-large": (architectures.t5("large", "1.0"), T5_LARGE, T5, 737_668_096),
    "t5-v1.1-small": (architectures.t5("small"), T5_V1_1_SMALL, T5, 76_961_152),
    "t5-v1.1-base": (architectures.t5("base", "1.1"), T5_V1_1_BASE, T5, 247_577_856),
    "t5-v1.1-large": (architectures.t5("large", "1.1"), T5_V1_1_LARGE, T5, 783_150_080),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_are_the_published_ones(name):
    ours, values, family, number = PUBLISHED[name]
    own_head = values.get("tie_word_embeddings") is False
    theirs = read(family, values, ("lm_head.weight",) if own_head else ())
    # A config.json says the rate, which is no part of the model that is imported.
    dropout = values.get("hidden_dropout_prob", values.get("dropout_rate"))
    ours, theirs = TransformerConfig(**ours), TransformerConfig(**theirs, dropout=dropout)
    if ours.head == "mlm":  # is the embedding, whatever `tied` says
        theirs = dataclasses.replace(theirs, tied=ours.tied)
    assert ours == theirs
    assert counts.num_parameters(ours) == number


@pytest.mark.parametrize(("big", "millions"), [(False, 65), (True, 213)])
def test_the_original_transformer_has_the_paper_s_sizes(big, millions):
    config = TransformerConfig(**architectures.original_transformer(big))
    # Table 3 of arXiv:1706.03762 rounds, and its vocabulary is "about 37000 tokens".
    assert counts.num_parameters(config) / 1e6 == pytest.approx(millions, rel=0.04)


# What the others begin from: runs of the pretraining configs, and models that packages carry.
RUNS = {
    "bert": "configs/pretrain_bert.py",
    "chinese": "configs/pretrain_chinese.py",
    "gpt": "configs/pretrain_gpt.py",
    "t5": "configs/pretrain_t5.py",
}
_MINILM = BERT_BASE | {
    "architectures": ["BertModel"], "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 600,
}  # fmt: skip
_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 512, "rope_theta": 100000, "vocab_size": 600,
    "tie_word_embeddings": True,
}  # fmt: skip
PACKAGED = {"hf:minilm": (BERT, _MINILM), "gguf:smollm2": (LLAMA, _SMOLLM2)}
# What a file holds beside the model's own parameters.
MORE = {"hf:minilm": {"pooler/kernel": (32, 32), "pooler/bias": (32,)}}

SPECS = {
    "configs/finetune_sentiment.py": (
        "", "debug", "scratch", "from=bert", "lang=zh,from=chinese",
        "lang=zh,from=chinese,scratch,debug",
    ),
    "configs/finetune_ner.py": (
        "", "debug", "scratch", "from=bert", "lang=zh,from=chinese",
        "lang=zh,from=chinese,scratch,debug",
    ),
    "configs/finetune_translation.py": (
        "from=t5", "from=t5,debug", "from=t5,scratch", "from=gpt,task=translate_en_zh",
    ),
    "configs/finetune_code.py": (
        "from=gpt", "from=gpt,debug", "from=gpt,scratch", "from=gpt,task=body_from_docstring",
    ),
    "configs/finetune_multitask.py": (
        "from=gpt", "from=gpt,debug", "from=gpt,tasks=sentiment_en,scratch",
    ),
    "configs/sft_chat.py": ("", "debug", "full", "task=chat_zh,debug"),
    "configs/dpo.py": ("from=gpt", "from=gpt,debug", "from=gguf:smollm2,task=preference_zh"),
}  # fmt: skip
NOT_INHERITED = ("scan", "remat", "attention", "lora_rank", "lora_alpha", "lora_targets")
CASES = [f"{file}:{argument}" for file, arguments in SPECS.items() for argument in arguments]


@pytest.fixture(scope="module", autouse=True)
def sources(tmp_path_factory):
    """The folder of the runs; the packaged models are what the tables make of their configs."""
    folder, original = tmp_path_factory.mktemp("sources"), source.model_values
    for name, file in RUNS.items():
        (folder / name).mkdir()
        # A run that was computed in another way.
        run = load_config(str(ROOT / file))[0]
        run["model"] |= {"scan": True, "remat": "full"}
        values = run_config(run).to_dict()
        (folder / name / "config.json").write_text(json.dumps(values))

    def model_values(spec):
        return read(*PACKAGED[spec]) if spec in PACKAGED else original(spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(source, "model_values", model_values)
        patch.setattr(source, "tokenizer_path", lambda spec, _: f"{spec}/tokenizer.json")
        yield folder


def load(spec, folder):
    """A config's values, with what is the source's, and the source's own."""
    for name in RUNS:
        spec = spec.replace(f"from={name}", f"from={folder / name}")
    values = load_config(spec)[0]
    return inherit_model(values), source.model_values(values["init"]["source"])


def test_all_configs_with_a_source_are_here():
    texts = {f"configs/{p.name}": p.read_text() for p in (ROOT / "configs").glob("*.py")}
    assert {name for name, text in texts.items() if '"from"' in text} == set(SPECS)


@pytest.mark.parametrize("spec", CASES)
def test_a_config_is_its_source_with_what_it_says(spec, sources):
    values, theirs = load(spec, sources)
    config, own = run_config(values), load_config(spec)[0]["model"]
    # How a source was computed, and adapters that are merged when it is read, are not inherited.
    fields = dataclasses.fields(TransformerConfig)
    defaults = {field.name: field.default for field in fields if field.name in NOT_INHERITED}
    assert config.model == TransformerConfig(**theirs | defaults | own)
    assert config.data.tokenizer == f"{config.init.source}/tokenizer.json"
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("spec", CASES)
def test_a_config_fits_its_tasks(spec, sources):
    config = run_config(load(spec, sources)[0])
    for name in config.tasks.names:
        task = find_task(name)
        task.check_model(config.model.head, config.model.num_classes)
        # Conversations and pairs are for their objectives alone.
        assert (config.objective.name == "dpo") == name.startswith("preference")
        if config.train.keep_best:
            assert config.train.metric == f"{name}/{task.metric}"


def shapes(values):
    """The shapes of a model's parameters by canonical name."""
    boxed = abstract_params(Transformer(TransformerConfig(**values)))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nn.unbox(boxed))
    return canonical.stacked_target(like)


@pytest.mark.parametrize("spec", CASES)
def test_a_source_s_parameters_are_taken_but_for_heads(spec, sources):
    values, theirs = load(spec, sources)
    config = run_config(values)
    loaded = shapes(theirs)
    for name, shape in MORE.get(config.init.source, {}).items():
        loaded[name] = jax.ShapeDtypeStruct(shape, "float32")
    wanted = shapes(dataclasses.asdict(dataclasses.replace(config.model, lora_rank=0)))
    _, new = merge_strict(loaded, wanted, config.init.skip, config.init.source)
    if "scratch" in spec:
        assert new == sorted(wanted)
    else:
        assert {name.split("/")[0] for name in new} <= {"classifier"}


CORRUPTING = [
    *(f"configs/pretrain_bert.py:{argument}" for argument in ("", "debug", "size=base")),
    *(f"configs/pretrain_chinese.py:{argument}" for argument in ("", "debug")),
    *(f"configs/pretrain_gpt.py:objective={name}{debug}" for debug in ("", ",debug")
      for name in ("fill_in_the_middle", "permutation_lm", "prefix_lm")),
    *(f"configs/pretrain_t5.py:{argument}" for argument in
      ("", "debug", "size=t5-small,version=1.0", "size=t5-base,debug", "size=t5-large")),
]  # fmt: skip


@pytest.mark.parametrize("spec", CORRUPTING)
def test_corrupted_rows_fit_the_model_and_have_their_special_tokens(spec):
    config = run_config(load_config(spec)[0])
    objective, seq_len, family = config.objective, config.data.seq_len, config.model.family
    tokenizer = byte_tokenizer(config.data.special_tokens)
    ids = special_ids(objective, seq_len, tokenizer.token_id, tokenizer.eos_id)
    assert make_transform(objective, ids, tokenizer.vocab_size, seq_len, family)
    assert num_positions(objective, seq_len, family) <= config.model.seq_len
    assert config.data.vocab_size <= config.model.vocab_size
    assert config.data.vocab_size >= tokenizer.vocab_size


@pytest.mark.parametrize("spec", [spec for spec in CASES if "debug" in spec])
def test_debug_runs_are_short(spec, sources):
    config = run_config(load(spec, sources)[0])
    assert (config.train.duration, config.train.batch_size) == ("20 steps", 8)
    assert config.tasks.limit and config.tasks.eval_examples <= 8
