"""Adapters begin as nothing, are all that is trained, and end inside the kernels."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import trees
from gpt_jax.models import lora
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, forward, init_params
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.optim.durations import Clock
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.trainable import trainable_mask
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.checkpoints import restore_params, save_params

DECODER = TransformerConfig(
    vocab_size=32, seq_len=8, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12,
    activation="swiglu", bias=True, init="gpt2", lora_rank=2, lora_alpha=6.0,
    lora_targets=("attention/(q|v|out)$", "layers/mlp/"),
)  # fmt: skip
ENCODER_DECODER = dataclasses.replace(
    DECODER, family="encoder_decoder", positions="relative", num_layers=1, activation="relu"
)
ALL = {
    "unrolled": DECODER,
    "scanned": dataclasses.replace(DECODER, scan=True),
    "encoder_decoder": ENCODER_DECODER,
}
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, 32, (2, 8), dtype=np.int32),
    "encoder_tokens": RNG.integers(0, 32, (2, 6), dtype=np.int32),
    "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    "segment_ids": np.ones((2, 8), np.int32),
    "encoder_segment_ids": np.ones((2, 6), np.int32),
}


def batch(config):
    """What a model of this family reads."""
    both = config.family == "encoder_decoder"
    return {name: x for name, x in BATCH.items() if both or not name.startswith("encoder")}


@functools.cache
def made(name, trained=True):
    """(config, parameters); `trained`: as if the adapters had been trained."""
    config, rng = ALL[name], np.random.default_rng(0)
    model = Transformer(config, "cpu")
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0))))

    def value(path, leaf):
        if path.endswith("lora_b") and not trained:
            return jnp.zeros(leaf.shape)
        return jnp.asarray(path.endswith("scale") + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return config, trees.map_named(value, shapes)


@functools.cache
def outputs_fn(config):
    model = Transformer(config, "cpu")
    return jax.jit(lambda params: forward(model, params, batch(config)))


def outputs(config, params):
    return np.asarray(outputs_fn(config)(params))


def without_adapters(params):
    """Parameters of the model that never had any."""
    if not isinstance(params, dict):
        return params
    return {k: without_adapters(v) for k, v in params.items() if not k.startswith("lora_")}


@pytest.mark.parametrize("name", ALL)
def test_adapters_begin_as_nothing_and_merge_into_the_kernels(name):
    config, fresh = made(name, trained=False)
    base = dataclasses.replace(config, lora_rank=0)
    at_first = outputs(base, without_adapters(fresh))
    np.testing.assert_array_equal(outputs(config, fresh), at_first)

    _, params = made(name)
    merged_config, merged = lora.merge_lora(config, params)
    assert merged_config == base
    assert jax.tree.structure(merged) == jax.tree.structure(without_adapters(fresh))
    apart = outputs(config, params)
    np.testing.assert_allclose(outputs(merged_config, merged), apart, atol=1e-5)
    assert np.abs(apart - at_first).max() > 1e-2


def test_the_second_factor_begins_as_zero():
    model = Transformer(ALL["scanned"], "cpu")

    @jax.jit
    def factors():
        params = trees.flatten(nn.unbox(init_params(model, jax.random.key(0))))
        return [params[f"stack/layers/attention/q/lora_{factor}"] for factor in "ab"]

    q_a, q_b = factors()
    assert not np.any(q_b) and 0.2 < np.std(q_a) < 0.5  # 1 / sqrt(8)


def test_stacked_layers_compute_what_unrolled_ones_do():
    config, params = made("unrolled")
    layers = [params["stack"][f"layers_{i}"] for i in range(2)]
    stacked = {**params, "stack": {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}}
    scanned, like = made("scanned")
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, like)
    np.testing.assert_allclose(outputs(scanned, stacked), outputs(config, params), atol=1e-5)


def test_the_targets_have_adapters_of_their_shapes():
    _, params = made("encoder_decoder")
    shapes = {name: leaf.shape for name, leaf in trees.flatten(params).items() if "lora" in name}
    assert shapes["stack/layers_0/cross_attention/v/lora_a"] == (8, 2)
    assert shapes["stack/layers_0/cross_attention/v/lora_b"] == (2, 1, 4)
    assert shapes["encoder/layers_0/attention/out/lora_a"] == (2, 4, 2)
    assert shapes["encoder/layers_0/attention/out/lora_b"] == (2, 8)
    assert not any("/k/" in name for name in shapes)
    # Three products of three attentions, two of two MLPs.
    assert len(shapes) == 2 * (3 * 3 + 2 * 2)


@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_a_step_changes_the_adapters_alone(name):
    config, params = made(name)
    settings = OptimizerConfig(warmup=0, schedule="constant", learning_rate=0.1, train=("^head",))
    mask = trainable_mask(params, settings, lora=True)
    mine = trees.select(params, mask)
    frozen = trees.select(params, jax.tree.map(lambda trained: not trained, mask))
    optimizer = make_optimizer(settings, Clock(1, 1, 1))
    model = Transformer(config, "cpu")

    @jax.jit
    def step(mine, frozen):
        def loss(mine):
            return jnp.square(forward(model, trees.merge(mine, frozen), batch(config)) - 1).mean()

        grads = jax.grad(loss)(mine)
        updates, slots = optimizer.update(grads, optimizer.init(mine), mine)
        return grads, jax.tree.map(jnp.add, mine, updates), slots

    grads, after, slots = step(mine, frozen)
    expected = {path for path in trees.flatten(params) if "lora_" in path or path == "head"}
    assert set(trees.flatten(grads)) == expected
    assert trees.num_elements(slots) == 2 * trees.num_elements(mine) + 2  # and two counters
    before, after = trees.flatten(params), trees.flatten(trees.merge(after, frozen))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == expected


def test_adapters_are_saved_alone(tmp_path):
    _, params = made("unrolled")
    mine = lora.adapters(params)
    save_params(tmp_path / "adapter", mine, {"base": "a run"})
    where = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), mine)
    restored, metadata = restore_params(tmp_path / "adapter", like)
    assert metadata["base"] == "a run"
    assert all(name.endswith(("/lora_a", "/lora_b")) for name in metadata["leaves"])
    others = trees.match(["(?<!lora_a)(?<!lora_b)$"], params)
    whole = trees.merge(restored, trees.select(params, others))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


@pytest.mark.parametrize("name", ["scanned", "encoder_decoder"])
def test_an_adapter_lies_on_the_mesh_like_its_kernel(name):
    model = Transformer(ALL[name], "cpu")
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    specs = {
        path: s.spec for path, s in trees.flatten(sharding.param_shardings(boxed, mesh)).items()
    }
    layer = "stack/layers" if name == "scanned" else "encoder/layers_0"
    up = {
        part: tuple(specs[f"{layer}/mlp/up/{part}"])[-2:] for part in ("kernel", "lora_a", "lora_b")
    }
    assert up == {
        "kernel": ("fsdp", "tensor"),
        "lora_a": ("fsdp", None),
        "lora_b": (None, "tensor"),
    }


@pytest.mark.parametrize(
    ("targets", "scan", "told"),
    [
        (("attention/q", "foo"), False, r"'foo' matches no product; products are named like "
         r"attention/k, attention/out, attention/q, attention/v, mlp/down, mlp/gate, mlp/up$"),
        (("layers_0/mlp",), True, r"'layers_0/mlp' names single layers, .* model.scan=False"),
        (("head",), False, "'head' matches no product"),
        (("(",), False, r"'\(' is no regular expression"),
    ],
)  # fmt: skip
def test_a_target_that_is_not_there_is_refused(targets, scan, told):
    config = dataclasses.replace(DECODER, scan=scan)
    params = jax.eval_shape(lambda: init_params(Transformer(config, "cpu"), jax.random.key(0)))
    lora.check_targets(params, config)
    with pytest.raises(ValueError, match=r"^model.lora_targets: " + told):
        lora.check_targets(params, dataclasses.replace(config, lora_targets=targets))
