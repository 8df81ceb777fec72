"""Keys in pages: what is written is what is read, and caches of them are those of plain keys."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.decode import caches
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params, make_cache
from gpt_jax.ops import key_pages, products
from gpt_jax.ops.key_pages import PAGE, KeyPages

CPU = products.precision("float32", "cpu")
CONFIG = TransformerConfig(
    vocab_size=40, seq_len=160, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, scan=False
)


def _random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _plain(keys: KeyPages, num_places: int) -> np.ndarray:
    """[B, K, S, H]."""
    *lead, _, _ = keys.rows_BKRC.shape
    pages = np.asarray(keys.rows_BKRC).reshape(*lead, -1, keys.width, PAGE).swapaxes(-1, -2)
    return pages.reshape(*lead, -1, keys.width)[..., :num_places, :]


@pytest.mark.parametrize("num_rows, num_heads", [(1, 1), (1, 2), (3, 2)])
def test_keys_stand_where_they_were_written(num_rows, num_heads):
    num_places, width = PAGE + 26, 6
    keys = key_pages.empty((num_rows, num_heads, num_places, width), jnp.float32)
    plain_BKSH = np.zeros((num_rows, num_heads, num_places, width), np.float32)
    index_B = np.arange(num_rows) * 2
    write = jax.jit(key_pages.write)
    for size in (5, PAGE - 4, 1, 1, 3):  # over the edge of a page, too
        new_BKTH = _random(num_rows, num_heads, size, width, seed=size)
        keys = write(keys, new_BKTH, jnp.asarray(index_B))
        for row, start in enumerate(index_B):
            plain_BKSH[row, :, start : start + size] = new_BKTH[row]
        index_B = index_B + size
    np.testing.assert_array_equal(_plain(keys, num_places), plain_BKSH)
    for queries in (1, 3, key_pages._MOST_QUERIES + 1):
        q_BKMH = _random(num_rows, num_heads, queries, width, seed=9)
        got = jax.jit(key_pages.scores, static_argnums=(2, 3))(q_BKMH, keys, num_places, CPU)
        wanted = np.einsum("bkmh,bksh->bkms", q_BKMH, plain_BKSH)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_place_is_left_out():
    keys = key_pages.empty((1, 2, PAGE, 4), jnp.float32)
    keys = key_pages.write(keys, jnp.ones((1, 2, 3, 4)), jnp.array([PAGE - 1]))
    written = _plain(keys, PAGE)
    assert (written[:, :, -1] == 1).all() and not written[:, :, :-1].any()


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens_BT, cache):
    return model.apply({"params": params}, tokens_BT, cache=cache)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_computes_the_same_with_them(scan):
    model = Transformer(dataclasses.replace(CONFIG, scan=scan))
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    tokens_BT = np.random.default_rng(0).integers(0, 40, (2, 80))
    known = [make_cache(model.config, 2, 90, "float32", paged) for paged in (False, True)]
    for start, stop in ((0, 60), (60, 63), (63, 64), (64, 65), (65, 80)):
        outputs = []
        for i, cache in enumerate(known):
            logits, known[i] = _run(model, params, tokens_BT[:, start:stop], cache)
            outputs.append(logits)
        np.testing.assert_allclose(*outputs, atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_caches_of_them_are_resized_and_filled_as_those_of_plain_keys(scan):
    config = dataclasses.replace(CONFIG, scan=scan)

    def filled(num_rows: int, length: int, paged: bool, seed: int):
        """The same keys in both, and values."""
        cache = make_cache(config, num_rows, length, "float32", paged)
        index_B = jnp.zeros(num_rows, jnp.int32)

        def fill(layer, seed):
            shape = layer.v_BKSH.shape
            keys, values = _random(*shape, seed=seed), _random(*shape, seed=seed + 1)
            if paged:
                write = key_pages.write
                write = jax.vmap(write, (0, 0, None)) if scan else write
                keys = write(layer.k_BKSH, keys, index_B)
            return layer.replace(k_BKSH=keys, v_BKSH=values)

        layers = cache.layers
        layers = fill(layers, seed) if scan else [fill(x, seed + i) for i, x in enumerate(layers)]
        return cache.replace(layers=layers)

    def check(paged, plain, length):
        for ours, theirs in zip(*(x.layers if not scan else [x.layers] for x in (paged, plain)),
                                strict=True):  # fmt: skip
            assert isinstance(ours.k_BKSH, KeyPages)
            np.testing.assert_array_equal(_plain(ours.k_BKSH, length), theirs.k_BKSH)
            np.testing.assert_array_equal(ours.v_BKSH, theirs.v_BKSH)

    pair = [filled(2, 70, paged, 0) for paged in (True, False)]
    others = [filled(3, 130, paged, 10) for paged in (True, False)]
    rows_B = jnp.array([1, 1, 0])
    for length in (PAGE, 128):
        check(*(caches.resized(cache, rows_B, length=length) for cache in pair), length)
    check(*(caches.reordered(cache, jnp.array([1, 0])) for cache in pair), 70)
    put = [
        caches.with_row(a, b, jnp.int32(2), jnp.int32(1)) for a, b in zip(pair, others, strict=True)
    ]
    check(*put, 70)


def test_they_are_for_shared_heads_on_cpu():
    model = Transformer(CONFIG, platform="cpu")
    assert isinstance(caches.empty(model, 2, 16, 0).layers[0].k_BKSH, KeyPages)
    for other in (
        model.clone(platform="gpu"),
        model.clone(config=dataclasses.replace(CONFIG, num_kv_heads=4)),
    ):
        assert caches.empty(other, 2, 16, 0).layers[0].k_BKSH.shape[2] == 16
