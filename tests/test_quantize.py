"""Weights in 8 and 16 bits: their error, their products, and models that compute with them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.decode import caches
from gpt_jax.decode.prompts import as_computed
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.quantize import is_bfloat16, num_bytes, quantize, to_bfloat16
from gpt_jax.models.transformer import Transformer, init_params, make_cache
from gpt_jax.ops import products, quantized
from gpt_jax.ops.quantized import Quantized

CPU = products.precision("float32", "cpu")
CONFIG = TransformerConfig(
    vocab_size=97, seq_len=16, num_layers=2, embed_dim=48, num_heads=4, num_kv_heads=2, mlp_dim=80,
    positions="rotary", norm="rmsnorm", activation="swiglu", tied=True, init="gpt2",
)  # fmt: skip
CONFIGS = {
    "tied": CONFIG,
    "untied": dataclasses.replace(CONFIG, tied=False, init="fan_in", positions="learned"),
    "scan": dataclasses.replace(CONFIG, scan=True, bias=True, norm="layernorm"),
    "encoder_decoder": dataclasses.replace(
        CONFIG, family="encoder_decoder", start_id=0, positions="relative", scan=True
    ),
    "mlm": dataclasses.replace(CONFIG, family="encoder", head="mlm"),
}


def _weights(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _random_params(model: Transformer):
    """Of the right shapes; not initialized, which would compile."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))

    def leaf(name, shape):
        if name.endswith("scale"):
            return jnp.ones(shape.shape)
        return _weights(*shape.shape, seed=len(name)) * (0.02 if name == "tokens" else 0.1)

    return trees.map_named(leaf, shapes)


@pytest.mark.parametrize("shape, num_contract", [((7, 5), 1), ((3, 4, 6, 5), 2), ((1, 1), 1)])
def test_error_is_at_most_half_a_scale(shape, num_contract):
    w_FK = _weights(*shape) * jnp.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    w = quantized.quantize(w_FK, num_contract)
    assert w.integers_FK.shape == shape and w.integers_FK.dtype == jnp.int8
    assert w.scale_F.shape == shape[: len(shape) - num_contract]
    bound = w.scale_F.reshape(*w.scale_F.shape, *(1,) * num_contract) / 2
    assert (jnp.abs(quantized.dequantize(w) - w_FK) <= bound * (1 + 1e-5)).all()
    # The largest of each row is met; a row of zeros (the first one here) stays so.
    tops = [jnp.abs(x).max(range(-num_contract, 0)) for x in (quantized.dequantize(w), w_FK)]
    np.testing.assert_allclose(*tops, rtol=1e-6)
    assert not quantized.dequantize(w)[0].any()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 80])
@pytest.mark.parametrize(
    "w_shape, num_contract",
    [
        ((40, 48), 1),  # vectors of 8 in two halves
        ((40, 768), 1),  # more of them than are unrolled
        ((40, 21), 1),  # not divided at all
        ((3, 8, 32), 1),
        ((24, 4, 8), 2),
        ((1, 1), 1),
    ],
)
def test_product_is_that_of_the_dequantized(num_rows, w_shape, num_contract):
    w = quantized.quantize(_weights(*w_shape), num_contract)
    x = _weights(1, num_rows, *w_shape[len(w_shape) - num_contract :], seed=1)
    dims = list(range(-num_contract, 0))
    wanted = np.tensordot(
        np.asarray(x, np.float64), np.asarray(quantized.dequantize(w), np.float64), (dims, dims)
    )
    for platform in ("cpu", "gpu"):
        precision = products.precision("float32", platform)
        got = jax.jit(lambda x, w, p=precision: products.project(x, w, p, num_contract))(x, w)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * abs(wanted).max())
        precision = products.precision("bfloat16", platform)
        got = products.project(x, w, precision, num_contract)
        assert got.dtype == jnp.dtype(precision.output)
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.03 * abs(wanted).max())


@pytest.mark.parametrize("num_rows", [1, 2, 8, 80])
def test_a_tied_head_of_few_rows_is_the_same_product(num_rows):
    w, x = _weights(65, 24), _weights(num_rows, 24)
    got = jax.jit(lambda x, w: products.project(x, w, CPU, output_first=True))(x, w)
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(w).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 8, 80])
@pytest.mark.parametrize(
    "x_shape, w_shape, num_contract, output_first",
    [
        ((64,), (64, 24), 1, False),  # blocks of 16 rows
        ((7,), (7, 24), 1, False),  # no blocks
        ((4, 8), (4, 8, 24), 2, False),
        ((48,), (48, 3, 8), 1, False),
        ((48,), (65, 48), 1, True),  # a tied head
    ],
)
def test_product_of_bfloat16_weights(num_rows, x_shape, w_shape, num_contract, output_first):
    w = _weights(*w_shape).astype(jnp.bfloat16)
    x = _weights(1, num_rows, *x_shape, seed=1)
    dims = ([-1], [-1]) if output_first else (list(range(-num_contract, 0)), [*range(num_contract)])
    exact = np.asarray(w, np.float64)
    for dtype, rounded in (("bfloat16", x.astype(jnp.bfloat16)), ("float32", x)):
        precision = products.precision(dtype, "cpu")
        got = jax.jit(
            lambda x, w, p=precision: products.project(x, w, p, num_contract, output_first)
        )(x, w)
        assert got.dtype == jnp.float32
        # Of one row, x is not rounded.
        rounded = x if num_rows == 1 else rounded
        wanted = np.tensordot(np.asarray(rounded, np.float64), exact, dims)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * abs(wanted).max())


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    """The model, its parameters, the 8-bit ones, and f32 ones of the same values."""
    model = Transformer(CONFIGS[request.param])
    params = _random_params(model)
    return model, params, quantize(params)


@functools.partial(jax.jit, static_argnames="model")
def _apply(model, params, tokens):
    source = tokens[:, ::-1] if model.config.family == "encoder_decoder" else None
    return model.apply({"params": params}, tokens, encoder_tokens=source)


def _rounded(params):
    """f32 parameters of the values that the 8-bit ones have, in the layout of kernels."""

    def leaf(name, q):
        if not isinstance(q, Quantized):
            return q
        w = quantized.dequantize(q)
        if name == "tokens":
            return w
        num_contract = q.integers_FK.ndim - q.scale_F.ndim
        lead = 1 if "layers/" in name else 0
        dims = list(range(w.ndim))
        return w.transpose(dims[:lead] + dims[-num_contract:] + dims[lead:-num_contract])

    named = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    leaves = [leaf(trees.path_name(path), x) for path, x in named[0]]
    return jax.tree.unflatten(named[1], leaves)


def test_outputs_are_those_of_the_rounded_weights(models):
    model, params, small = models
    rounded = _rounded(small)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.shape, y.shape), rounded, params)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (2, 16)))
    got, exact, full = (_apply(model, p, tokens) for p in (small, rounded, params))
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)
    # Near the model's own, but not the same: something was rounded.
    difference = (got - full).std() / full.std()
    assert 1e-3 < difference < 0.05, difference


def test_every_product_is_quantized_and_nothing_else(models):
    _, params, small = models
    kept = {n for n, x in trees.flatten(small).items() if x.dtype != jnp.int8}
    kept = {name for name in kept if not name.endswith("scale_F")}
    names = {name.split("/")[-1] for name in kept}
    assert names <= {"scale", "bias", "positions", "relative", "encoder_relative"}, names
    assert num_bytes(small) < 0.45 * num_bytes(params)


def test_bfloat16_weights_are_the_products_and_the_embedding(models):
    model, params, small = models
    half = to_bfloat16(params)
    assert is_bfloat16(half) and not is_bfloat16(params) and not is_bfloat16(small)
    leaves, integers = trees.flatten(half), trees.flatten(small)
    rounded = {name for name, x in leaves.items() if x.dtype == jnp.bfloat16}
    assert rounded == {name[: -len("/integers_FK")] for name in integers if "integers" in name}
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (2, 16)))
    full, got = _apply(model, params, tokens), _apply(model, half, tokens)
    difference = (got - full).std() / full.std()
    assert 1e-4 < difference < 0.02, difference


def test_on_cpu_bfloat16_weights_decode_in_bfloat16_with_a_float32_cache():
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"), platform="cpu")
    params = _random_params(model)
    half = to_bfloat16(params)
    assert as_computed(model, params).config.dtype == "float32"
    assert as_computed(model, half).config.dtype == "bfloat16"
    assert caches.empty(model, 2, 16, 0).layers[0].v_BKSH.dtype == jnp.float32
    on_gpu = model.clone(platform="gpu")
    assert as_computed(on_gpu, params).config.dtype == "bfloat16"
    assert caches.empty(on_gpu, 2, 16, 0).layers[0].v_BKSH.dtype == jnp.bfloat16


@pytest.mark.parametrize("num_rows", [1, 2])
def test_decoding_in_bfloat16_gives_the_logits_of_the_whole_text(num_rows):
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    half = to_bfloat16(_random_params(model))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (num_rows, 4)))
    whole = _apply(model, half, tokens)
    step = jax.jit(lambda token, cache: model.apply({"params": half}, token, cache=cache))
    cache = caches.empty(model, num_rows, 4, 0)
    for t in range(4):
        logits, cache = step(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=0.05 * float(whole.std()))


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text():
    model = Transformer(CONFIG)
    small = quantize(_random_params(model))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (1, 4)))
    whole = _apply(model, small, tokens)
    step = jax.jit(lambda token, cache: model.apply({"params": small}, token, cache=cache))
    cache = make_cache(CONFIG, 1, 4, jnp.float32)
    for t in range(4):
        logits, cache = step(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)
