"""Properties of the Transformer."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.likelihood import likelihood
from gpt_jax.ops import attention, blocked_attention
from gpt_jax.runs import canonical
from gpt_jax.scaling import counts

OURS = TransformerConfig(
    vocab_size=50, seq_len=16, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2
)
GPT2 = dataclasses.replace(
    OURS, num_kv_heads=4, positions="learned", norm="layernorm", activation="gelu", bias=True,
    tied=True, qk_norm=False, init="gpt2",
)  # fmt: skip
OTHER = dataclasses.replace(
    OURS, num_kv_heads=1, activation="swiglu", logit_softcap=15.0, head_dim=8, mlp_dim=24,
    dtype="bfloat16",
)  # fmt: skip
CONFIGS = {"ours": OURS, "gpt2": GPT2, "other": OTHER}


def make(config, seed=0):
    """A model and parameters that are nowhere zero, so that every path counts."""
    model, rng = Transformer(config), np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens(1, 1)))["params"]

    def draw(name, leaf):
        # As wide as the usual initializers draw: by the inputs of a product.
        values = rng.standard_normal(leaf.shape) * (
            leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.2
        )
        return jnp.asarray(values + name.endswith("scale"), jnp.float32)

    return model, trees.map_named(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, *arrays):
    return model.apply({"params": params}, *arrays)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Sequences of 16 are several blocks of queries."""
    monkeypatch.setattr(blocked_attention, "_BLOCK", 6)


def tokens(*shape, seed=3):
    return jax.random.randint(jax.random.key(seed), shape, 0, 50)


@pytest.mark.parametrize("kind", ["einsum", "blocked", "xla"])
@pytest.mark.parametrize("name", CONFIGS)
def test_causality_by_gradient(name, kind):
    config = dataclasses.replace(CONFIGS[name], attention=kind, dtype="float32")
    model, params = make(config)
    batch, at = tokens(1, 16), 9

    def logits_at(noise_TD):
        # Noise on the input of each position, put in through the embedding of a token of its own.
        table = jnp.concatenate([params["tokens"][batch[0]] + noise_TD, params["tokens"][16:]])
        own = model.clone(config=dataclasses.replace(config, tied=False, vocab_size=50))
        head = params["tokens"].T if config.tied else params["head"]
        inputs = {**params, "tokens": table, "head": head}
        return own.apply({"params": inputs}, jnp.arange(16)[None])[0, at].sum()

    grad_TD = jax.jit(jax.grad(logits_at))(jnp.zeros((16, config.embed_dim)))
    moved = jnp.abs(grad_TD).max(axis=1) > 0
    assert moved[: at + 1].all() and not moved[at + 1 :].any()


@pytest.mark.parametrize("kind", ["einsum", "blocked", "xla"])
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_packed_equals_unpacked(name, kind):
    model, params = make(dataclasses.replace(CONFIGS[name], attention=kind))
    lengths = (6, 1, 6, 3)
    documents = [tokens(1, n, seed=n) for n in lengths]
    batch = jnp.concatenate(documents, axis=1)
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.repeat(jnp.arange(1, 5), jnp.array(lengths))[None]
    packed = logits(model, params, batch, positions, segments)
    alone = jnp.concatenate([logits(model, params, document) for document in documents], axis=1)
    np.testing.assert_allclose(packed, alone, atol=2e-5)
    # And without segments the documents do see each other.
    assert jnp.abs(logits(model, params, batch) - packed).max() > 1e-2


def loss_and_grads(model, params, deterministic=True):
    batch = {"targets": tokens(2, 16, seed=4), "loss_mask": jnp.ones((2, 16))}

    def loss(p):
        rngs = {"dropout": jax.random.key(0)}
        outputs = model.apply({"params": p}, tokens(2, 16), deterministic=deterministic, rngs=rngs)
        return likelihood(outputs, batch)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_equals_unrolled(name):
    model, params = make(dataclasses.replace(CONFIGS[name], dtype="float32", attention="einsum"))
    scanned = model.clone(config=dataclasses.replace(model.config, scan=True))
    like = nn.unbox(jax.eval_shape(scanned.init, jax.random.key(0), tokens(1, 1)))["params"]
    stacked = trees.unflatten(canonical.stack(params), like)
    loss, grads = loss_and_grads(model, params)
    loss_scan, grads_scan = loss_and_grads(scanned, stacked)
    np.testing.assert_allclose(loss_scan, loss, rtol=1e-6)
    assert_all_close(trees.flatten(grads_scan), canonical.stack(grads))


def assert_all_close(a, b, rtol=1e-5):
    """Equal but for rounding: by the largest of all, as some gradients are zero in theory."""
    assert a.keys() == b.keys()
    scale = max(float(jnp.abs(x).max()) for x in b.values())
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize(("policy", "scan"), [("dots", False), ("full", True)])
def test_remat_equals_none_and_recomputes(policy, scan):
    config = dataclasses.replace(OURS, scan=scan, dropout=0.3, attention="einsum")
    model, params = make(config)
    rematted = model.clone(config=dataclasses.replace(config, remat=policy))
    loss, grads = loss_and_grads(model, params, deterministic=False)
    loss_remat, grads_remat = loss_and_grads(rematted, params, deterministic=False)
    np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
    assert_all_close(trees.flatten(grads_remat), trees.flatten(grads))

    def products(m):
        jaxpr = jax.make_jaxpr(lambda p: loss_and_grads(m, p))(params)
        return str(jaxpr).count("dot_general")

    # The comparison is not of a thing with itself: the backward pass holds more products.
    if policy == "full":
        assert products(rematted) > products(model)


def test_dropout_needs_its_key_and_changes_the_output():
    model, params = make(dataclasses.replace(OURS, dropout=0.5))

    @functools.partial(jax.jit, static_argnums=1)
    def run(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(
            {"params": params}, tokens(1, 16), deterministic=deterministic, rngs=rngs
        )

    assert jnp.abs(run(0, False) - run(1, False)).max() > 1e-3
    np.testing.assert_array_equal(run(0, True), run(1, True))


def test_every_attention_may_be_configured():
    for name in attention.IMPLEMENTATIONS:
        dataclasses.replace(OURS, attention=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_parameters(name):
    config = CONFIGS[name]
    shapes = nn.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens(1, 1)))[
        "params"
    ]
    assert counts.num_parameters(config) == trees.num_elements(shapes)


def test_flops_are_those_of_the_compiled_products():
    # Of a forward pass XLA counts 2 a multiply-add, and all of the scores, masked or not.
    config = dataclasses.replace(OURS, attention="einsum", head_dim=64, num_kv_heads=4, seq_len=256)
    model, params = make(config)
    forward = jax.jit(lambda p, t: model.apply({"params": p}, t))
    counted = forward.lower(params, tokens(1, 256)).compile().cost_analysis()["flops"]
    rule = counts.flops_per_token(config, 256) / 3
    causal_half = 2 * config.num_layers * config.num_heads * config.head_dim * 256
    assert counted == pytest.approx(256 * (rule + causal_half), rel=0.1)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_heads", 3, "embed_dim 16"),
        ("num_kv_heads", 3, "num_heads 4"),
        ("num_layers", 0, "at least 1"),
        ("activation", "tanh", "swiglu"),
        ("positions", "alibi", "rotary"),
        ("norm", "batchnorm", "rmsnorm"),
        ("dropout", 1.0, "[0, 1)"),
        ("remat", "all", "dots"),
        ("dtype", "float16", "bfloat16"),
        ("attention", "flash", "cudnn"),
        ("head_dim", 5, "even"),
        ("norm_eps", 0.0, "above 0"),
    ],
)
def test_a_bad_value_is_named(field, value, told):
    values = {"vocab_size": 50, "seq_len": 16, "num_layers": 2, "embed_dim": 16, "num_heads": 4}
    with pytest.raises(ValueError) as error:
        TransformerConfig(**{**values, field: value})
    message = str(error.value)
    assert message.startswith(f"model.{field}: {value!r}") and told in message
