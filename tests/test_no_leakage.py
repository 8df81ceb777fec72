"""No prediction sees what it predicts, by gradient; queries in a row are two-stream attention.

A small model runs over corrupted rows whose tokens are all different, so that the gradient with
respect to one row of the embedding is that with respect to one input.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward, init_params
from gpt_jax.objectives import transforms
from gpt_jax.objectives.config import ObjectiveConfig

EOS, MASK, LENGTH = 0, 1, 36
CONFIG = TransformerConfig(
    vocab_size=64, seq_len=LENGTH, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16,
    positions="learned", norm="layernorm", activation="gelu", bias=True, qk_norm=False,
    init="gpt2",
)  # fmt: skip
MODEL = Transformer(CONFIG, "cpu")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0))
    # Large, so that nothing that is seen has an influence near 0.
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), nn.meta.unbox(shapes)
    )


def corrupted(name, seed, documents=(0, 8)):
    """A corrupted row of 16 tokens as a batch of one row, padded to LENGTH."""
    rng = np.random.default_rng(seed)
    row = rng.permutation(np.arange(16, 64))[:17]
    row[list(documents)] = EOS
    settings = {"mask_rate": 0.4, "mask_share": 0.9, "random_share": 0.0}
    config = ObjectiveConfig(name, **(settings if name == "masked_lm" else {}))
    names = {"<mask>": MASK, "<|fim_prefix|>": 2, "<|fim_suffix|>": 3, "<|fim_middle|>": 4}
    names |= {f"<extra_id_{i}>": 5 + i for i in range(10)}
    ids = transforms.special_ids(config, 16, names.get, EOS)
    transform = transforms.make_transform(config, ids, 64, 16)
    record = transform(row, rng)
    for ranks in ("key_ranks", "query_ranks"):
        record.setdefault(ranks, record["positions"])
    return {field: np.pad(array, (0, LENGTH - len(array)))[None] for field, array in record.items()}


@jax.jit
def influence(params, batch):
    """f32[LENGTH, V]: how much each output changes with the embedding of each token."""

    def outputs(tokens):
        mix = jnp.sin(jnp.arange(64.0) ** 2)
        return forward(MODEL, {**params, "tokens": tokens}, batch)[0] @ mix

    return jnp.abs(jax.jacrev(outputs)(params["tokens"])).sum(-1)


@pytest.mark.parametrize(
    "name",
    ["prefix_lm", "masked_lm", "span_corruption", "permutation_lm", "fill_in_the_middle"],
)
def test_nothing_that_counts_sees_its_target(name, params):
    seen = 0
    for seed in range(3):
        batch = corrupted(name, seed)
        by_token = np.asarray(influence(params, batch))
        for i in np.flatnonzero(batch["loss_mask"][0]):
            target = batch["targets"][0, i]
            # Special tokens stand in many places; what masking leaves as it is may be seen.
            if target < 16 or (name == "masked_lm" and batch["tokens"][0, i] == target):
                continue
            assert by_token[i, target] == 0.0, (name, seed, i)
            seen += (by_token[i, 16:] > 0).sum()
    assert seen > 30  # it does see others


@pytest.mark.parametrize("documents", [(0,), (0, 8), (3, 4)])
def test_a_query_sees_exactly_what_comes_before_it(documents, params):
    for seed in range(3):
        batch = corrupted("permutation_lm", seed, documents)
        row = {name: array[0] for name, array in batch.items()}
        by_token = np.asarray(influence(params, batch))
        content = np.arange(LENGTH) < 16
        for i in np.flatnonzero(row["loss_mask"]):
            before = content & (row["segment_ids"] == row["segment_ids"][i])
            before &= row["key_ranks"] <= row["query_ranks"][i]
            assert set(np.flatnonzero(by_token[i])) == {MASK, *row["tokens"][before].tolist()}


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    return x * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def two_streams(p, tokens, positions, segments, order):
    """XLNet's streams h and g as the paper writes them (equations 3 and 4): logits of g, [n, V]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)

    def project(x, dense):
        return np.einsum("td,dnh->tnh", x, dense["kernel"]) + dense["bias"]

    def layer(stream, h, sees, p):
        queries = project(norm(stream, p["attention_norm"]), p["attention"]["q"])
        keys, values = (project(norm(h, p["attention_norm"]), p["attention"][x]) for x in "kv")
        scores = np.einsum("tnh,snh->nts", queries, keys) / np.sqrt(CONFIG.head_dim)
        weights = np.exp(np.where(sees, scores, -1e30) - scores.max())
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        out = p["attention"]["out"]
        mixed = np.einsum("nts,snh,nhd->td", weights, values, out["kernel"])
        stream = stream + mixed + out["bias"]
        up, down = p["mlp"]["up"], p["mlp"]["down"]
        hidden = gelu(norm(stream, p["mlp_norm"]) @ up["kernel"] + up["bias"])
        return stream + hidden @ down["kernel"] + down["bias"]

    same = segments[:, None] == segments
    h = p["tokens"][tokens] + p["positions"][positions]
    g = p["tokens"][MASK] + p["positions"][positions]
    for i in range(CONFIG.num_layers):
        layer_params = p["stack"][f"layers_{i}"]
        # The same weights for both; keys and values from h of the layer below.
        g, h = (
            layer(g, h, same & (order < order[:, None]), layer_params),
            layer(h, h, same & (order <= order[:, None]), layer_params),
        )
    return norm(g, p["final_norm"]) @ p["head"]


@pytest.mark.parametrize("documents", [(0,), (0, 8)])
def test_a_row_with_queries_is_two_stream_attention(documents, params):
    batch = corrupted("permutation_lm", 0, documents)
    row = {name: array[0, :16] for name, array in batch.items()}
    expected = two_streams(
        params, row["tokens"], row["positions"], row["segment_ids"], row["key_ranks"]
    )
    logits = np.asarray(forward(MODEL, params, batch))[0]
    checked = 0
    for i in np.flatnonzero(batch["loss_mask"][0]):
        place = np.flatnonzero(row["tokens"] == batch["targets"][0, i])[0]
        np.testing.assert_allclose(logits[i], expected[place], atol=1e-4)
        checked += 1
    assert checked >= 2
