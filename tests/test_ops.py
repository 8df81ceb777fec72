"""Products, attention and cross-entropy against plain f32 references, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.ops import attention, products
from gpt_jax.ops.losses import cross_entropy

F32 = products.precision("float32", "cpu")
BF16 = products.precision("bfloat16", "cpu")
BF16_GPU = products.precision("bfloat16", "gpu")
PRECISIONS = {"f32": (F32, 2e-5), "bf16": (BF16, 2e-2), "accelerator": (BF16_GPU, 3e-2)}


def _random(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def _value_and_grads(fn, *arrays):
    """The output and, for a fixed random cotangent, the gradients of all arrays.

    The cotangent is an argument as in training: XLA folds a constant into other products.
    """
    (g,) = _random(9, jax.eval_shape(fn, *arrays).shape)

    def value_and_grads(g, *arrays):
        out, pull = jax.vjp(fn, *arrays)
        return out, *pull(g.astype(out.dtype))

    return jax.jit(value_and_grads)(g, *arrays)


def _assert_close(got, wanted, tolerance):
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape
        error = jnp.abs(x.astype(jnp.float32) - y).max() / (jnp.abs(y).max() + 1e-6)
        assert error < tolerance, (x.shape, float(error))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "x_shape, w_shape, num_contract, output_first",
    [
        ((2, 64, 24), (24, 40), 1, False),  # up
        ((2, 64, 40), (40, 24), 1, False),  # down: the result's transpose is computed
        ((2, 64, 24), (24, 2, 8), 1, False),  # queries
        ((2, 64, 2, 8), (2, 8, 24), 2, False),  # out
        ((2, 64, 24), (65, 24), 1, True),  # a tied head
        ((2, 64, 24), (7, 24), 1, True),
        ((1, 3, 24), (24, 40), 1, False),  # few rows
        ((1, 1, 1), (1, 1), 1, False),
    ],
)
def test_project(precision, x_shape, w_shape, num_contract, output_first):
    precision, tolerance = PRECISIONS[precision]
    x, w = _random(0, x_shape, w_shape)

    def reference(x, w):
        return jnp.tensordot(x, w.T if output_first else w, num_contract, precision="highest")

    fast = functools.partial(
        products.project, precision=precision, num_contract=num_contract, output_first=output_first
    )
    got = _value_and_grads(fast, x, w)
    _assert_close(got, _value_and_grads(reference, x, w), tolerance)
    assert got[2].dtype == jnp.float32


def _reference_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    G = q_BTNH.shape[2] // k_BSKH.shape[2]
    k, v = (jnp.repeat(x, G, axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k, precision="highest")
    scores = scores * q_BTNH.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


@pytest.mark.parametrize("implementation", ["einsum", "blocked"])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 160, 4, 4, 16), (2, 130, 4, 2, 16), (1, 600, 1, 1, 8), (2, 16, 3, 1, 8), (1, 1, 1, 1, 8)],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_causal_attention(implementation, precision, segments, shape):
    B, T, N, K, H = shape
    precision, tolerance = PRECISIONS[precision]
    q, k, v = _random(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    rng = np.random.default_rng(2)
    ids_BT = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), axis=1)) if segments else None
    mask_BTS = jnp.tril(jnp.ones((B, T, T), bool))
    if segments:
        mask_BTS &= ids_BT[:, :, None] == ids_BT[:, None, :]

    fast = functools.partial(
        attention.attention, precision=precision, segment_ids_BT=ids_BT,
        implementation=implementation,
    )  # fmt: skip
    got = _value_and_grads(fast, q, k, v)
    reference = functools.partial(_reference_attention, mask_BTS=mask_BTS)
    _assert_close(got, _value_and_grads(reference, q, k, v), tolerance)


@pytest.mark.parametrize("implementation", ["einsum", "blocked"])
def test_attention_with_a_mask(implementation):
    """As with a cache: few queries, more keys, each row its own length."""
    q, k, v = _random(3, (2, 3, 4, 8), (2, 100, 2, 8), (2, 100, 2, 8))
    mask_BTS = jnp.arange(100) <= (jnp.array([[5], [70]]) + jnp.arange(3))[..., None]
    got = attention.attention(
        q, k, v, precision=F32, mask_BTS=mask_BTS, implementation=implementation
    )
    _assert_close([got], [_reference_attention(q, k, v, mask_BTS)], 2e-5)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy(z_loss):
    (logits_BTV,) = _random(4, (2, 5, 11))
    targets_BT = jnp.arange(10).reshape(2, 5)

    def reference(logits):
        lse_BT = jax.nn.logsumexp(logits, -1)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], -1)[
            ..., 0
        ] + z_loss * jnp.square(lse_BT)

    got = _value_and_grads(lambda x: sum(cross_entropy(x, targets_BT, z_loss)), logits_BTV)
    _assert_close(got, _value_and_grads(reference, logits_BTV), 1e-5)
