"""Decoders beside the installed transformers: both spellings of configs, greedy text, depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import make_hf_fixtures as fixture
import numpy as np
import pytest
from test_hf_parity import imported, outputs

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.source import ARCHITECTURES
from gpt_jax.models.transformer import Transformer, make_cache

pytestmark = pytest.mark.peers

_SIZES = dict(
    vocab_size=320, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=160, max_position_embeddings=8192,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=4096,
)  # fmt: skip
# As transformers 4 writes them, or leaves out: class, and what comes beside the sizes.
OLD = [
    ("Llama", "", {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
    ("Llama", "", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("Llama", "", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("Mistral", "", {"rope_theta": 1e6}),
    ("Mistral", "", {"sliding_window": None}),
    ("Mistral", "", {"sliding_window": 128, "head_dim": 32}),
    ("Qwen2", "", {"use_sliding_window": True, "max_window_layers": 2}),
    ("Qwen2", "", {"use_sliding_window": False, "sliding_window": 512, "rope_theta": 1e6}),
    ("Qwen3", "", {"rope_theta": 1e6}),
    ("SmolLM3", "", {"no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    ("Gemma", "", {"hidden_act": "gelu", "hidden_activation": None}),
    ("Gemma2", "", {"query_pre_attn_scalar": 224, "attn_logit_softcapping": None}),
    ("Gemma3", "Text", {}),
    (
        "Gemma3",
        "Text",
        {
            "rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 512,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "rest"), OLD)
def test_both_spellings_are_read_as_transformers_does(name, kind, rest):
    import transformers

    old = {**_SIZES, "architectures": [f"{name}ForCausalLM"], **rest}
    theirs = getattr(transformers, f"{name}{kind}Config").from_dict(dict(old)).to_dict()
    assert theirs["rope_parameters"], "transformers 5 spells it so"
    values = ARCHITECTURES[f"{name}ForCausalLM"].values
    old["model_type"] = theirs["model_type"]
    assert values(HFConfig(old, "old")) == values(HFConfig(theirs, "new"))


def model_of(case, seed, tmp_path):
    """(the torch model, our config, our parameters) of a case's weights."""
    model, shapes, config_json = fixture.hf_model(case, seed)
    weights = fixture.weights(case, shapes, seed)
    return model, *imported(fixture.write_folder(tmp_path, config_json, weights))


@functools.partial(jax.jit, static_argnums=0)
def advance(config, params, tokens_BT, cache):
    logits_BTV, cache = Transformer(config).apply({"params": params}, tokens_BT, cache=cache)
    return logits_BTV[:, -1].argmax(-1)[:, None], cache


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_greedy_text_is_that_of_transformers_past_the_window(name, tmp_path):
    import torch

    seed, prompt, new = 7, 30, 64
    case = fixture.CASES[name]
    model, config, params = model_of(case, seed, tmp_path)
    ids_BT = fixture.inputs(case, seed)["input_ids"][:, :prompt]
    model.generation_config.eos_token_id = None
    theirs = model.generate(
        torch.from_numpy(ids_BT.astype(np.int64)), do_sample=False, max_new_tokens=new,
        pad_token_id=0,
    )[0, prompt:].tolist()  # fmt: skip
    token, cache = jnp.asarray(ids_BT), make_cache(config, 1, prompt + new, "float32")
    ours = []
    for _ in range(new):
        token, cache = advance(config, params, token, cache)
        ours.append(int(token[0, 0]))
    assert ours == theirs


DEEP = dict(num_hidden_layers=16, hidden_size=256, num_attention_heads=8, intermediate_size=640)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_at_real_depth_our_distance_to_float64_is_of_the_order_of_torch_s_own(name, tmp_path):
    case, seed = fixture.CASES[name], 7
    case = dataclasses.replace(case, config={**case.config, **DEEP})
    model, config, params = model_of(case, seed, tmp_path)
    arguments = fixture.inputs(case, seed)
    theirs = fixture.hf_outputs(case, model, arguments)["logits"]
    exact = fixture.hf_outputs(case, model.double(), arguments)["logits"]
    ours = outputs(case, config, params, arguments)["logits"]
    distances = [np.abs(x - exact).max() for x in (ours, theirs)]
    print(f"{name}: ours {distances[0]:.2g}, torch's {distances[1]:.2g}")
    assert distances[0] < 4 * distances[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_in_bfloat16_we_are_as_near_as_torch(name, tmp_path):
    import torch

    case, seed = fixture.CASES[name], 7
    model, shapes, config_json = fixture.hf_model(case, seed)
    arguments = fixture.inputs(case, seed)
    for parameter in model.parameters():  # its rotary frequencies stay as they are
        parameter.data = parameter.data.to(torch.bfloat16)
    with torch.inference_mode():
        ids_BT = torch.from_numpy(arguments["input_ids"]).long()
        theirs = model(ids_BT).logits.float().numpy()
    rounded = {name: model.state_dict()[name].float().numpy() for name in shapes}
    spec = fixture.write_folder(tmp_path, config_json, rounded)
    exact = fixture.hf_outputs(case, model.double(), arguments)["logits"]
    config, params = imported(spec, dtype="bfloat16")
    ours = outputs(case, config, params, arguments)["logits"]
    distances = [np.sqrt(np.square(x - exact).mean()) for x in (ours, theirs)]
    print(f"{name} in bfloat16: ours {distances[0]:.2g}, torch's {distances[1]:.2g}")
    assert distances[0] < distances[1]
