"""Frozen parameters, rates by layer, and which parameter gets what, by path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.optim.durations import Clock
from gpt_jax.optim.layer_decay import multipliers
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.trainable import trainable_mask

CLOCK = Clock(tokens_per_step=1, tokens_per_epoch=100, total_steps=100)


def block(cross=False, lora=False):
    """Shapes of one block: D=4, N=2, H=2, F=8."""
    product = {"kernel": (4, 2, 2), "bias": (2, 2)}
    if lora:
        product |= {"lora_a": (4, 3), "lora_b": (3, 2, 2)}
    attention = {"q": product, "out": {"kernel": (2, 2, 4)}, "q_norm": {"scale": (2,)}}
    mlp = {"up": {"kernel": (4, 8)}, "down": {"kernel": (8, 4), "bias": (4,)}}
    parts = {"attention_norm": {"scale": (4,)}, "attention": attention, "mlp": mlp}
    return parts | ({"cross_attention": {"k": {"kernel": (4, 2, 2)}}} if cross else {})


def arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def decoder(num_layers=3, **kwargs):
    layers = {f"layers_{i}": block(**kwargs) for i in range(num_layers)}
    names = {"tokens": (16, 4), "positions": (8, 4), "classifier": {"kernel": (4, 2)}}
    return {**names, "stack": layers, "final_norm": {"scale": (4,), "bias": (4,)}}


ENCODER_DECODER = {
    **decoder(2, cross=True),
    "encoder": {f"layers_{i}": block() for i in range(4)},
    "encoder_norm": {"scale": (4,)},
    "relative": (8, 2),
    "encoder_relative": (8, 2),
    "token_types": (2, 4),
    "embed_norm": {"scale": (4,)},
    "pooler": {"kernel": (4, 4), "bias": (4,)},
    "mlm": {"dense": {"kernel": (4, 4)}, "norm": {"scale": (4,)}, "bias": (16,)},
}


def stacked(params):
    """The layers of `stack` in one tree of leaves [L, ...]."""
    layers = [params["stack"][f"layers_{i}"] for i in range(len(params["stack"]))]
    return {**params, "stack": {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}}


def mask_of(params, lora=False, **values):
    return trainable_mask(params, OptimizerConfig(**values), lora)


def trained(params, lora=False, **values):
    mask = trees.flatten(mask_of(params, lora, **values))
    return {name for name, selected in mask.items() if selected}


def test_what_is_selected_and_the_rest_are_the_whole():
    params = arrays(decoder())
    mask = trees.match([r"^stack/layers_0/", "^tokens"], params)

    @jax.jit
    def parts(params):
        chosen = trees.select(params, mask)
        rest = trees.select(params, jax.tree.map(lambda selected: not selected, mask))
        return chosen, rest, trees.merge(chosen, rest)

    chosen, rest, whole = parts(params)
    assert len(jax.tree.leaves(chosen)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(params))
    assert chosen["positions"] is None and rest["tokens"] is None
    assert trees.all_names(chosen) == trees.all_names(rest) == list(trees.flatten(params))
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    for first, second in ((chosen, chosen), (whole, rest)):
        with pytest.raises(AssertionError, match="both trees or in neither"):
            trees.merge(first, second)


def test_freezing_goes_by_path_and_training_wins():
    params = arrays(decoder())
    names = set(trees.flatten(params))
    assert trained(params) == names
    frozen = {
        n for n in names if n == "tokens" or n.startswith(("stack/layers_0", "stack/layers_1"))
    }
    freeze = ("^tokens", "stack/layers_[01]/")
    assert trained(params, freeze=freeze) == names - frozen
    back = {name for name in frozen if name.endswith("/scale")}
    assert trained(params, freeze=freeze, train=("scale$",)) == names - frozen | back


def test_with_adapters_they_alone_are_trained_and_what_is_named():
    params = arrays(decoder(lora=True))
    adapters = {
        name for name in trees.flatten(params) if name.rsplit("/")[-1] in ("lora_a", "lora_b")
    }
    assert len(adapters) == 6
    assert trained(params, lora=True) == adapters
    assert trained(params, lora=True, train=("^classifier",)) == adapters | {"classifier/kernel"}
    kept = trained(params, lora=True, freeze=("layers_0",))
    assert kept == {name for name in adapters if "layers_0" not in name}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"freeze": ("^token$",)}, r"optimizer.freeze: '\^token\$' matches no parameter; .* named "
                                   r"like .*positions.*, \.\.\."),
        ({"freeze": ("tokens",), "train": ("head",)}, "optimizer.train: 'head' matches no param"),
        ({"freeze": ("",)}, r"optimizer.freeze: \(''?,\) leaves no parameter to train"),
    ],
)  # fmt: skip
def test_a_pattern_that_does_nothing_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        mask_of(arrays(decoder()), **values)


def test_single_layers_of_a_stacked_model_cannot_be_frozen():
    params = stacked(arrays(decoder()))
    with pytest.raises(ValueError, match=r"freeze: 'layers_0\|tokens' names .*model.scan=False"):
        mask_of(params, freeze=("layers_0|tokens",))
    # What names all layers does so however they are kept.
    for freeze in ("^stack/", "^stack/layers/"):
        for either in (params, arrays(decoder())):
            assert not any(name.startswith("stack") for name in trained(either, freeze=(freeze,)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"freeze": ("(",)}, r"optimizer.freeze: '\(' is no regular expression"),
        ({"layer_decay": 0.0}, r"optimizer.layer_decay: 0.0 is not in \(0, 1\]"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        OptimizerConfig(**values)


def test_rates_fall_towards_the_embeddings():
    found = trees.flatten(multipliers(arrays(decoder(3)), 0.5))
    assert found["tokens"] == found["positions"] == 0.5**4
    assert [found[f"stack/layers_{i}/mlp/up/kernel"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["final_norm/scale"] == found["classifier/kernel"] == 1


def test_each_stack_of_an_encoder_decoder_is_counted_from_its_own_top():
    found = trees.flatten(multipliers(arrays(ENCODER_DECODER), 0.5))
    assert found["encoder/layers_3/attention/q/kernel"] == 0.5
    assert found["stack/layers_1/cross_attention/k/kernel"] == 0.5
    assert found["encoder/layers_0/mlp/up/kernel"] == 0.5**4
    for name in ("tokens", "token_types", "positions", "embed_norm/scale"):
        assert found[name] == 0.5**5, name
    for name in ("relative", "encoder_relative", "encoder_norm/scale", "mlm/dense/kernel"):
        assert found[name] == 1, name


def test_stacked_layers_have_the_rates_of_unrolled_ones():
    params = arrays(decoder(3))
    unrolled = trees.flatten(multipliers(params, 0.7))
    scanned = trees.flatten(multipliers(stacked(params), 0.7))
    for name, ndim in (("attention/q/kernel", 4), ("attention_norm/scale", 2)):
        factors = scanned[f"stack/layers/{name}"]
        expected = [unrolled[f"stack/layers_{i}/{name}"] for i in range(3)]
        np.testing.assert_allclose(factors.ravel(), expected, rtol=1e-6)
        assert factors.shape == (3,) + (1,) * (ndim - 1)


def test_frozen_layers_still_count():
    params = arrays(decoder(3))
    whole = trees.flatten(multipliers(params, 0.5))
    for freeze in ("layers_2", "layers_0", "^stack"):
        part = multipliers(trees.select(params, mask_of(params, freeze=(freeze,))), 0.5)
        part = trees.flatten(part)
        assert part == {name: whole[name] for name in part}
    one = stacked(params)
    optimizer = make_optimizer(OptimizerConfig(layer_decay=0.5), CLOCK)
    with pytest.raises(ValueError, match=r"layer_decay: all of 'stack' is frozen"):
        optimizer.init(trees.select(one, mask_of(one, freeze=("^stack",))))


def two_steps(config, params, grads):
    """Updates of the second step by name, and the slots; one compilation."""
    optimizer = make_optimizer(config, CLOCK)

    @jax.jit
    def steps(params, grads):
        _, slots = optimizer.update(grads, optimizer.init(params), params)
        return optimizer.update(grads, slots, params)

    updates, slots = steps(params, grads)
    return trees.flatten(updates), slots


FREEZE = ("^tokens", "^encoder/layers_0", "^stack/layers_1/(mlp|cross)", "^mlm", "q/bias$")


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_frozen_parameters_have_no_slots_and_do_not_move_the_others(name):
    config = OptimizerConfig(
        name=name, schedule="constant", warmup=0, clip_norm=0.5, freeze=FREEZE, layer_decay=0.8
    )
    params, grads = arrays(ENCODER_DECODER), arrays(ENCODER_DECODER, seed=1)
    mask = trainable_mask(params, config)
    some, some_grads = trees.select(params, mask), trees.select(grads, mask)
    updates, slots = two_steps(config, some, some_grads)
    assert set(updates) == set(trees.flatten(some)) < set(trees.flatten(params))
    for path in trees.flatten(slots):
        assert not any(frozen in path for frozen in ("tokens", "encoder/layers_0", "q/bias"))
    # The same as for a tree that never had them; the rates come on top.
    plain = dataclasses.replace(config, layer_decay=1.0)
    alone, _ = two_steps(plain, trees.flatten(some), trees.flatten(some_grads))
    factors = trees.flatten(multipliers(some, 0.8))
    for path, update in alone.items():
        expected = factors[path] * np.asarray(update)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)


DECAYED = {
    "tokens", "classifier/kernel", "pooler/kernel", "mlm/dense/kernel",
    "stack/layers_0/attention/q/kernel", "stack/layers_0/cross_attention/k/kernel",
    "stack/layers_0/attention/q/lora_a", "stack/layers_1/attention/q/lora_b",
    "encoder/layers_3/mlp/down/kernel", "encoder/layers_0/attention/out/kernel",
}  # fmt: skip
NOT_DECAYED = {
    "positions", "token_types", "relative", "encoder_relative", "embed_norm/scale", "mlm/bias",
    "mlm/norm/scale", "pooler/bias", "encoder_norm/scale", "final_norm/bias",
    "stack/layers_0/attention/q/bias", "stack/layers_0/attention/q_norm/scale",
    "encoder/layers_1/mlp/down/bias", "encoder/layers_1/attention_norm/scale",
}  # fmt: skip


def test_weight_decay_is_for_matrices():
    params = arrays({**ENCODER_DECODER, **decoder(2, cross=True, lora=True)})
    config = OptimizerConfig(schedule="constant", warmup=0, weight_decay=0.5)
    updates, _ = two_steps(config, params, jax.tree.map(jnp.zeros_like, params))
    params = trees.flatten(params)
    for name in DECAYED:
        np.testing.assert_allclose(updates[name], -3e-4 * 0.5 * params[name], rtol=1e-5)
    for name in NOT_DECAYED:
        assert not np.any(updates[name]), name


def test_muon_is_for_the_matrices_of_the_layers():
    def muon_names(params):
        slots = make_optimizer(OptimizerConfig(name="muon", clip_norm=0), CLOCK).init(params)
        paths = [path for path in trees.flatten(slots) if "/muon/" in path and "/mu/" in path]
        return {path.split("/mu/")[1] for path in paths}

    params = arrays(ENCODER_DECODER)
    expected = {
        name
        for name in trees.flatten(params)
        if name.startswith(("stack/", "encoder/")) and name.endswith("/kernel")
    }
    assert muon_names(params) == expected
    assert "stack/layers_1/cross_attention/k/kernel" in expected
    assert not any("lora" in name for name in muon_names(arrays(decoder(lora=True))))
