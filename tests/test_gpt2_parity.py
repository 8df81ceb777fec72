"""Our GPT with GPT-2's architecture against Hugging Face's, on weights that hide no mistake."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import make_gpt2_fixture as fixture
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.generate import generate
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models import layers
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer

# Of the logits, which are of order 10. The noise is 9e-6; the smallest mistake below, another
# epsilon of the norms, makes 7e-4.
TOLERANCE = 5e-5
# Ours -> Hugging Face's; a number is the third of the last axis (q, k and v lie in one array).
TOP = {
    "tokens": ("wte.weight", None),
    "positions": ("wpe.weight", None),
    "final_norm/scale": ("ln_f.weight", None),
    "final_norm/bias": ("ln_f.bias", None),
}
LAYER = {
    "attention_norm/scale": ("ln_1.weight", None),
    "attention_norm/bias": ("ln_1.bias", None),
    "attention/q/kernel": ("attn.c_attn.weight", 0),
    "attention/q/bias": ("attn.c_attn.bias", 0),
    "attention/k/kernel": ("attn.c_attn.weight", 1),
    "attention/k/bias": ("attn.c_attn.bias", 1),
    "attention/v/kernel": ("attn.c_attn.weight", 2),
    "attention/v/bias": ("attn.c_attn.bias", 2),
    "attention/out/kernel": ("attn.c_proj.weight", None),
    "attention/out/bias": ("attn.c_proj.bias", None),
    "mlp_norm/scale": ("ln_2.weight", None),
    "mlp_norm/bias": ("ln_2.bias", None),
    "mlp/up/kernel": ("mlp.c_fc.weight", None),
    "mlp/up/bias": ("mlp.c_fc.bias", None),
    "mlp/down/kernel": ("mlp.c_proj.weight", None),
    "mlp/down/bias": ("mlp.c_proj.bias", None),
}


def config_for(size, **changes):
    values = dict(
        positions="learned", norm="layernorm", norm_eps=1e-5, activation="gelu", bias=True,
        tied=True, qk_norm=False, init="gpt2",
    )  # fmt: skip
    return TransformerConfig(**dataclasses.asdict(size), **values | changes)


def params_for(config, weights):
    """Our parameters of Hugging Face's weights; every weight must be used."""
    boxed = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    used = set()

    def hf(name, part):
        used.add(name)
        return weights[name] if part is None else np.split(weights[name], 3, axis=-1)[part]

    def leaf(path, like):
        if path in TOP:
            return hf(*TOP[path]).reshape(like.shape)
        _, group, rest = path.split("/", 2)
        name, part = LAYER[rest]
        numbers = range(config.num_layers) if config.scan else [int(group.split("_")[1])]
        return np.stack([hf(f"h.{i}.{name}", part) for i in numbers]).reshape(like.shape)

    params = trees.map_named(leaf, nn.unbox(boxed)["params"])
    assert used == set(weights), set(weights) - used
    return jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnames="config")
def logits(config, params, ids_T):
    return Transformer(config).apply({"params": params}, ids_T[None])[0]


@functools.cache
def expected():
    with np.load(fixture.DATA / "gpt2_2x64.npz") as file:
        return dict(file)


@functools.cache
def made():
    weights = fixture.weights(fixture.SMALL, int(expected()["seed"]))
    np.testing.assert_allclose(fixture.checksum(weights), expected()["checksum"], rtol=1e-6)
    return weights


def distance(config, params):
    """Largest difference of our logits from Hugging Face's in float64."""
    ids_T = fixture.tokens(fixture.SMALL, int(expected()["seed"]))
    ours_TV = np.asarray(logits(config, params, ids_T))
    return np.abs(ours_TV[expected()["positions"]] - expected()["logits"]).max()


@pytest.mark.parametrize("scan", [False, True])
def test_the_logits_are_those_of_hugging_face(scan):
    config = config_for(fixture.SMALL, scan=scan)
    assert distance(config, params_for(config, made())) < TOLERANCE
    assert np.abs(expected()["logits"]).max() > 5


def changed(params, patterns, change):
    """Parameters with `change` made to all that a pattern names."""
    found = trees.match(patterns, params)
    assert any(jax.tree.leaves(found)), patterns
    return jax.tree.map(lambda leaf, hit: change(leaf) if hit else leaf, params, found)


@pytest.mark.parametrize(
    "patterns, change",
    [
        ([r"q/bias"], jnp.zeros_like),
        ([r"v/bias"], jnp.zeros_like),
        ([r"out/bias"], jnp.zeros_like),
        ([r"up/bias"], jnp.zeros_like),
        ([r"down/bias"], jnp.zeros_like),
        ([r"attention_norm/bias"], jnp.zeros_like),
        ([r"mlp_norm/bias"], jnp.zeros_like),
        ([r"final_norm/bias"], jnp.zeros_like),
        ([r"attention_norm/scale"], jnp.ones_like),
        ([r"mlp_norm/scale"], jnp.ones_like),
        ([r"final_norm/scale"], jnp.ones_like),
        # 1.25 times the queries is a wrong scale of the attention.
        ([r"q/kernel", r"q/bias"], lambda x: 1.25 * x),
        # The heads' numbers in another order.
        ([r"layers_1/attention/out/kernel"], lambda x: x.swapaxes(0, 1).reshape(x.shape)),
        ([r"^positions"], lambda x: jnp.roll(x, 1, axis=0)),
    ],
)
def test_mistakes_in_weights_show(patterns, change):
    config = config_for(fixture.SMALL)
    assert distance(config, changed(params_for(config, made()), patterns, change)) > 4 * TOLERANCE


def test_mistakes_in_the_architecture_show(monkeypatch):
    config = config_for(fixture.SMALL)
    params = params_for(config, made())
    small_eps = dataclasses.replace(config, norm_eps=1e-6)
    assert distance(small_eps, params) > 4 * TOLERANCE
    exact_gelu = functools.partial(nn.gelu, approximate=False)
    monkeypatch.setitem(layers._ACTIVATIONS, "gelu", exact_gelu)
    # Another, equal configuration: the right program is compiled already.
    exact = dataclasses.replace(config, rope_theta=1.0)
    assert distance(exact, params) > 4 * TOLERANCE


def test_greedy_tokens_are_those_of_hugging_face():
    config = config_for(fixture.SMALL)
    ids, start = expected()["greedy"].tolist(), int(expected()["prompt_length"])
    engine = Engine(Transformer(config), params_for(config, made()))
    sampling = SamplingParams(temperature=0.0, max_tokens=64)
    (ours,) = generate(engine, [ids[:start]], sampling)
    assert [token.id for token in ours] == ids[start:]


@pytest.mark.peers
@pytest.mark.parametrize("size", [fixture.SMALL, fixture.GPT2_124M], ids=["2x64", "12x768"])
def test_our_distance_to_float64_is_of_the_order_of_torch_s_own(size):
    seed, config = 1, config_for(size)
    ids_T = fixture.tokens(size, seed)
    model = fixture.hf_model(size, seed)
    theirs_TV = fixture.hf_logits(model, ids_T)
    exact_TV = fixture.hf_logits(model.double(), ids_T)
    params = params_for(config, fixture.weights(size, seed))
    ours = np.abs(np.asarray(logits(config, params, ids_T)) - exact_TV).max()
    theirs = np.abs(theirs_TV - exact_TV).max()
    print(f"largest distance to float64: ours {ours:.2g}, torch's {theirs:.2g}")
    assert ours < 4 * theirs
