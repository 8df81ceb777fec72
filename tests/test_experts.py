"""Mixture-of-experts layers: routing, places, losses, caches, counts, refusals."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.convert.export_config import hf_config
from gpt_jax.models import experts
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.quantize import quantize
from gpt_jax.models.transformer import Transformer, forward, forward_training, make_cache
from gpt_jax.objectives.config import ObjectiveConfig
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.state import Fixed
from gpt_jax.scaling import counts
from gpt_jax.train.mesh_checks import check_mesh
from gpt_jax.train.step import gradients

CONFIG = TransformerConfig(
    vocab_size=64, seq_len=16, num_layers=2, embed_dim=16, num_heads=2, init="gpt2",
    num_experts=4, activation="swiglu", bias=True, attention="einsum",
)  # fmt: skip


def make(config=CONFIG):
    model = Transformer(config, "cpu")
    init = jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), int))))
    return model, init()["params"]


def outputs(model, params, batch, training=False):
    """Logits; training: as in a step, with the router's sums."""
    run = forward_training if training else forward
    return jax.jit(functools.partial(run, model))(params, batch)


def batch_of(B=4, T=16, padding=0):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (B, T)).astype(np.int32)
    segments = np.ones((B, T), np.int32)
    segments[0, T - padding :] = 0
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return {"tokens": tokens, "targets": tokens, "positions": positions,
            "segment_ids": segments, "loss_mask": (segments > 0).astype("f4")}  # fmt: skip


def test_one_expert_is_the_dense_mlp():
    one = dataclasses.replace(CONFIG, num_experts=1, experts_per_token=1)
    model, params = make(one)
    names = {n for n in trees.flatten(params) if "/mlp/" in n}

    def dense(name, leaf):
        return leaf[0] if name in names and not name.endswith("router") else leaf

    flat = {n: dense(n, x) for n, x in trees.flatten(params).items() if not n.endswith("router")}
    nested = {}
    for name, leaf in flat.items():
        node = nested
        *folders, last = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    plain = Transformer(dataclasses.replace(one, num_experts=0), "cpu")
    batch = batch_of()
    got = outputs(model, params, batch)
    np.testing.assert_allclose(got, outputs(plain, nested, batch), atol=1e-6)


def test_a_token_goes_through_its_experts_with_gates_that_add_up_to_one():
    """Against a loop over tokens and experts."""
    config = dataclasses.replace(CONFIG, num_experts=5, activation="relu2")
    layer = experts.Experts(config)
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    params = nn.unbox(layer.init(jax.random.key(0), x, None, "cpu"))["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    got = layer.apply({"params": params}, x, None, "cpu")
    params = jax.tree.map(np.asarray, params)
    for b in range(2):
        for t in range(3):
            token = np.asarray(x[b, t])
            logits = token @ params["router"]
            probabilities = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-probabilities)[:2]
            wanted = 0.0
            for e in best:
                up = token @ params["up"]["kernel"][e] + params["up"]["bias"][e]
                down = np.square(np.maximum(up, 0)) @ params["down"]["kernel"][e]
                gate = probabilities[e] / probabilities[best].sum()
                wanted = wanted + gate * (down + params["down"]["bias"][e])
            np.testing.assert_allclose(got[b, t], wanted, rtol=1e-4, atol=1e-5)


def test_with_places_for_all_nothing_changes_and_with_one_the_rest_is_dropped():
    batch = batch_of(padding=3)
    model, params = make(dataclasses.replace(CONFIG, expert_capacity=4.0))
    everything, sums = outputs(model, params, batch, True)
    assert float(sums["dropped"]) == 0.0
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(
        np.asarray(everything)[real], np.asarray(outputs(model, params, batch))[real], atol=1e-5
    )
    model, _ = make(dataclasses.replace(CONFIG, expert_capacity=0.125))  # one place an expert
    assert experts.num_places(model.config, 16) == 1
    few, sums = outputs(model, params, batch, True)
    # Of 61 tokens with two choices each, at most 4 experts x 4 rows are taken in a layer.
    assert float(sums["dropped"]) >= 61 - 16 / 2
    assert np.abs(np.asarray(few - everything)[real]).max() > 1e-3
    # Evaluation drops nothing.
    np.testing.assert_array_equal(outputs(model, params, batch), outputs(make()[0], params, batch))


def test_places_are_given_in_the_order_of_the_tokens():
    chosen = jnp.array([[[0, 1], [1, 0], [1, 2], [0, 1]]])
    real = jnp.array([[True, True, False, True]])
    places = experts.places_of_choices(chosen, real, 3)
    np.testing.assert_array_equal(places[0, [0, 1, 3]], [[0, 0], [1, 1], [2, 2]])


@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_a_token_does_not_feel_later_ones(capacity):
    """In training too: which of the earlier choices were dropped is as before."""
    model, params = make(dataclasses.replace(CONFIG, expert_capacity=capacity, num_layers=1))
    batch = batch_of(B=1)
    changed = {**batch, "tokens": batch["tokens"].copy()}
    changed["tokens"][0, 9:] = (changed["tokens"][0, 9:] + 7) % 64
    one, other = (outputs(model, params, b, True)[0] for b in (batch, changed))
    np.testing.assert_array_equal(one[0, :9], other[0, :9])
    assert np.abs(one[0, 9:] - other[0, 9:]).max() > 1e-3


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_a_cache_it_is_the_whole_text(scan):
    config = dataclasses.replace(CONFIG, scan=scan, expert_capacity=0.25)
    model, params = make(config)
    tokens = batch_of(B=2)["tokens"]
    read = jax.jit(lambda params, tokens, **how: model.apply({"params": params}, tokens, **how))
    whole = read(params, tokens)
    cache = make_cache(config, 2, 16, "float32")
    parts = []
    for part in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):
        logits, cache = read(params, part, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("capacity", [0.0, 0.75])
def test_experts_over_devices_are_experts(capacity):
    """A layer, its router's sums and all gradients, with rows, experts and widths in parts."""
    layer = experts.Experts(dataclasses.replace(CONFIG, expert_capacity=capacity))
    x = jax.random.normal(jax.random.key(1), (8, 6, 16))
    segments = jnp.ones((8, 6), jnp.int32).at[0, 4:].set(0)
    boxed = layer.init(jax.random.key(0), x, segments, "cpu")["params"]

    def loss(params, x):
        y, told = layer.apply({"params": params}, x, segments, "cpu", mutable=[experts.ROUTER])
        sums = experts.summed(told, 1)
        return (y**2).sum() + sums["balance"] + sums["z"], (y, sums)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(run)(nn.unbox(boxed), x)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    placed = jax.device_put(nn.unbox(boxed), sharding.param_shardings(boxed, mesh))
    assert placed["up"]["kernel"].addressable_shards[0].data.shape == (2, 16, 32)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, jax.device_put(x, sharding.batch_sharding(mesh, x.shape)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_losses_of_the_router_do_not_change_with_accumulation(scan):
    config = dataclasses.replace(
        CONFIG, scan=scan, expert_balance=1.0, router_z_loss=0.1, expert_capacity=0.5
    )
    model, params = make(config)
    batch = batch_of(padding=5)
    found = []
    for number in (1, 4):
        run = functools.partial(
            gradients, model=model, objective=make_objective(ObjectiveConfig()),
            num_microbatches=number,
        )  # fmt: skip
        grads, means, _ = jax.jit(run)(params, batch, Fixed(), jax.random.key(0))
        found.append((trees.flatten(grads), means))
    for name, value in found[0][1].items():
        np.testing.assert_allclose(found[1][1][name], value, rtol=1e-5, err_msg=name)
    for name, grad in found[0][0].items():
        scale = float(jnp.abs(grad).max())
        np.testing.assert_allclose(found[1][0][name], grad, atol=1e-5 * scale, err_msg=name)
    assert 1.0 <= float(found[0][1]["router_balance"]) <= 4.0
    assert float(found[0][1]["router_dropped"]) > 0


def test_an_even_router_has_a_balance_of_one_and_a_lazy_one_of_all():
    chosen = jnp.array([[[0], [1], [2], [3]]])
    real = jnp.ones((1, 4), bool)
    even = jnp.full((1, 4, 4), 0.25)
    sums = experts.router_sums(jnp.log(even), even, chosen, real)
    assert float(sums["balance"]) / 4 == pytest.approx(1.0)
    assert float(sums["z"]) == pytest.approx(0.0, abs=1e-6)
    lazy = jax.nn.one_hot(jnp.zeros((1, 4), int), 4)
    sums = experts.router_sums(lazy, lazy, jnp.zeros((1, 4, 1), int), real)
    assert float(sums["balance"]) / 4 == pytest.approx(4.0)


@pytest.mark.parametrize("gated", [False, True])
def test_counts_are_those_of_the_parameters(gated):
    config = dataclasses.replace(CONFIG, activation="swiglu" if gated else "relu2")
    _, params = make(config)
    assert counts.num_parameters(config) == trees.num_elements(params)
    # Of four experts two are not active: their kernels and biases.
    mlp = 3 * 16 * 64 + 2 * 64 + 16 if gated else 2 * 16 * 64 + 64 + 16
    idle = 2 * 2 * mlp
    assert counts.num_active_parameters(config) == counts.num_parameters(config) - idle
    dense = dataclasses.replace(config, num_experts=0)
    assert counts.num_active_parameters(dense) == counts.num_parameters(dense)
    flops = counts.flops_per_token(config, 16)
    # A second expert and the router.
    more = 6 * 2 * (mlp + 16 * 4)
    assert flops == counts.flops_per_token(dense, 16) + more


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"experts_per_token": 5}, "experts_per_token"),
        ({"family": "encoder_decoder"}, "family"),
        ({"mup_base_width": 8}, "mup_base_width"),
        ({"lora_rank": 2, "lora_targets": ("mlp/up$",)}, "lora_targets"),
        ({"expert_capacity": -1.0}, "expert_capacity"),
    ],
)
def test_what_has_no_rule_is_refused(values, told):
    with pytest.raises(ValueError, match=rf"^model\.{told}: "):
        dataclasses.replace(CONFIG, **values)


def test_other_forms_and_meshes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^model\.num_experts: "):
        quantize(make()[1])
    with pytest.raises(ValueError, match="num_experts 0"):
        hf_config(dataclasses.replace(CONFIG, bias=False, qk_norm=False), (), "it")
    words = ["mesh.expert=4", "mesh.data=2"]
    for more, told in (([], "model.num_experts 0"), (["model.num_experts=6"], "num_experts 6")):
        values = load_config("configs/gpt.py:size=100k,debug", words + more)[0]
        config = run_config(values)
        with pytest.raises(ValueError, match=rf"^mesh\.expert: 4 does not divide .*{told}"):
            check_mesh(config, make_mesh(MeshConfig(data=2, expert=4)))
