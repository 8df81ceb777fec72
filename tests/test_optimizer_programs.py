"""Optimizers as programs: the same numbers as optax, and slots that are updated in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from gpt_jax import trees
from gpt_jax.optim import muon as muon_module
from gpt_jax.optim.adam import scale_by_adam
from gpt_jax.optim.muon import muon

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "a": {"kernel": jax.random.normal(KEYS[0], (6, 12))},
    "b": {"kernel": jax.random.normal(KEYS[1], (12, 6))},
    "tokens": jax.random.normal(KEYS[2], (5, 6)),
}


def _two_updates(transform):
    state = transform.init(PARAMS)
    _, state = jax.jit(transform.update)(PARAMS, state, PARAMS)
    return jax.jit(transform.update)(jax.tree.map(jnp.sin, PARAMS), state, PARAMS)


def _assert_equal(ours, theirs):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_muon_is_that_of_optax():
    def numbers(params):
        return trees.map_named(
            lambda name, _: (
                contrib.MuonDimensionNumbers((-2,), (-1,)) if "kernel" in name else None
            ),
            params,
        )

    ours = muon(
        lambda _: 0.1, lambda _: 0.01, lambda name: ((-2,), (-1,)) if "kernel" in name else None,
        beta=0.9, b1=0.8, b2=0.95, eps=1e-8, weight_decay=0.1, decay_mask=None,
    )  # fmt: skip
    theirs = contrib.muon(
        lambda _: 0.1, adam_learning_rate=lambda _: 0.01, beta=0.9, adam_b1=0.8, adam_b2=0.95,
        eps=1e-8, weight_decay=0.1, muon_weight_dimension_numbers=numbers,
    )  # fmt: skip
    _assert_equal(_two_updates(ours), _two_updates(theirs))


def test_adam_is_that_of_optax_and_stays_where_nothing_is_finite():
    ours = scale_by_adam(0.9, 0.95, 1e-8)
    _assert_equal(_two_updates(ours), _two_updates(optax.scale_by_adam(0.9, 0.95, 1e-8)))
    _, state = _two_updates(ours)
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, after = ours.update(bad, state, PARAMS, finite=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_adam_needs_no_copy_of_its_slots():
    transform = scale_by_adam(0.9, 0.95, 1e-8)

    def step(param, state, grad, finite):
        update, state = transform.update(grad * 2, state, finite=finite)
        return jnp.where(finite, param - 1e-3 * (update + 0.1 * param), param), state

    x = jax.ShapeDtypeStruct((4096, 768), jnp.float32)
    state = jax.eval_shape(transform.init, x)
    finite = jax.ShapeDtypeStruct((), bool)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, state, x, finite).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * x.size / 2


def test_matrices_in_batches_are_those_of_one_batch(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (5, 4, 6))
    iterate = functools.partial(
        muon_module._newton_schulz, coefficients=jnp.asarray(muon_module._COEFFICIENTS), eps=1e-8
    )
    whole = muon_module._in_batches(iterate, x)
    monkeypatch.setattr(muon_module, "_AT_ONCE", 2 * 4 * 6)
    text = str(jax.make_jaxpr(lambda x: muon_module._in_batches(iterate, x))(x))
    assert "scan" in text and "f32[2,2,4,6]" in text  # two at a time, and one that is left
    np.testing.assert_allclose(muon_module._in_batches(iterate, x), whole, atol=1e-6)
