"""Products, attention and cross-entropy against plain f32 references, gradients included."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.ops import attention, normalization, products
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
        ((2, 1024, 24), (24, 40), 1, False),  # rows of zeros are added
        ((2, 1024, 2, 8), (2, 8, 24), 2, False),
        ((2, 1024, 24), (7, 24), 1, True),
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


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    "shape, axes, split",
    [((6, 4), (1, 0), 0), ((7, 4), (1, 0), 0), ((1, 4), (1, 0), 0), ((2, 6, 3, 5), (0, 2, 1, 3), 1)]
    + [((2, 5, 3, 6), (0, 2, 3, 1), 3), ((2, 5, 3, 7), (3, 0, 2, 1), 2)],
)
def test_transposed(shape, axes, split, once):
    (x,) = _random(6, shape)
    function = products.transposed_once if once else products.transposed
    written = jax.jit(functools.partial(function, axes=axes, split=split))
    np.testing.assert_array_equal(written(x), np.transpose(x, axes))
    x = x.at[(0,) * x.ndim].set(jnp.nan)  # what the conditional of transposed_once looks at
    np.testing.assert_array_equal(written(x), np.transpose(x, axes))


def _attend(q, k, v):
    segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    return attention.attention(
        q, k, v, segment_ids_BT=segment_ids, precision=BF16, implementation="blocked"
    )


@pytest.mark.parametrize(
    "fn, shapes, num_products",
    [
        (functools.partial(products.project, precision=BF16), [(2, 64, 24), (24, 40)], 3),
        (functools.partial(products.project, precision=BF16), [(2, 64, 40), (40, 24)], 3),
        (_attend, [(1, 256, 2, 16)] * 3, 12),  # two blocks
        (_attend, [(1, 255, 2, 16)] * 3, 12),  # no two halves
    ],
    ids=["up", "down", "attention", "attention of an odd row"],
)
def test_products_stay_in_bf16(fn, shapes, num_products):
    # XLA:CPU says nothing where it casts the operands of a product up to f32, which is slow.
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    g = jax.eval_shape(fn, *arrays)

    def value_and_grads(g, *arrays):
        out, pull = jax.vjp(fn, *arrays)
        return out, *pull(g)

    text = jax.jit(value_and_grads).lower(g, *arrays).compile().as_text()
    dtypes = dict(re.findall(r"([\w.-]+)(?: =|:) (\w+)\[", text))
    found = [re.findall(r"([\w.-]+)(?:,|$)", x) for x in re.findall(r" dot\(([^)]*)\)", text)]
    assert len(found) == num_products
    assert {dtypes[name] for operands in found for name in operands} == {"bf16"}


@pytest.mark.parametrize(
    "rows, num_out, of_rows, over_rows",
    [
        (1984, 40, [1984, 1984], 1984),
        (2048, 40, [2064, 2064], 2064),
        (4096, 40, [4112, 4112], 4112),
        (2048, 400, [2048, 2064], 2064),  # a head's product is not cut
    ],
)
def test_no_product_contracts_a_multiple_of_2048_rows(rows, num_out, of_rows, over_rows):
    # x^T of so many tokens has rows in one set of the cache, which is slow.
    def value_and_grads(g, x, w, b):
        def affine(x, w, b):
            return products.add_bias(products.project(x, w, BF16), b, BF16)

        out, pull = jax.vjp(affine, x, w, b)
        return out, *pull(g)

    x_shape = (2, rows // 2, 24)
    shapes = [(*x_shape[:2], num_out), x_shape, (24, num_out), (num_out,)]
    text = jax.jit(value_and_grads).lower(*_random(3, *shapes)).compile().as_text()
    by_rows = [int(n) for n in re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", text)]
    # The gradient of w, over rows; the forward product and the gradient of x, of rows.
    assert sorted(by_rows) == [24, *of_rows]
    assert f"bf16[24,{over_rows}]" in text
    # x and g are padded once, and summed with the rows of zeros.
    assert len(re.findall(r" concatenate\(", text)) == (2 if over_rows > rows else 0)
    assert len(re.findall(r" reduce\(", text)) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "y_shape, b_shape", [((2, 64, 3, 8), (3, 8)), ((1, 3, 24), (24,)), ((2, 1024, 24), (24,))]
)
def test_add_bias(precision, y_shape, b_shape):
    precision, tolerance = PRECISIONS[precision]
    y, b = _random(7, y_shape, b_shape)
    got = _value_and_grads(functools.partial(products.add_bias, precision=precision), y, b)
    _assert_close(got, _value_and_grads(jnp.add, y, b), tolerance)


def _layer_norm(x, scale, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias


def _rms_norm(x, scale):
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


NORMS = {
    "layer": (lambda *arrays: normalization.layer_norm(*arrays, 1e-5), _layer_norm, 3),
    "layer, no bias": (lambda *two: normalization.layer_norm(*two, None, 1e-5), _layer_norm, 2),
    "rms": (lambda *arrays: normalization.rms_norm(*arrays, 1e-5), _rms_norm, 2),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [(2, 5), (3, 2, 7), ()])
def test_norms(norm, dims):
    ours, reference, num_arrays = NORMS[norm]
    x, *others = _random(8, (*dims, 12), (12,), (12,))
    arrays = (3 + x, *others[: num_arrays - 1])
    _assert_close(_value_and_grads(ours, *arrays), _value_and_grads(reference, *arrays), 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_leave_no_sum_to_the_library(norm):
    ours, _, num_arrays = NORMS[norm]
    g, *arrays = _random(8, *[(4, 256, 48)] * 2, *[(48,)] * (num_arrays - 1))

    def value_and_grads(g, *arrays):
        out, pull = jax.vjp(ours, *arrays)
        return out, *pull(g)

    text = jax.jit(value_and_grads).lower(g, *arrays).compile().as_text()
    assert text.count(" dot(") >= 2 * num_arrays - 1 and " reduce(" not in text


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
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("B", [1, 2])
def test_windows_and_capped_scores(implementation, precision, B):
    precision, tolerance = PRECISIONS[precision]
    T, window, softcap = 150, 40, 3.0
    q, k, v = _random(5, (B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 8))
    fast = functools.partial(
        attention.attention, precision=precision, window=jnp.int32(window), softcap=softcap,
        implementation=implementation,
    )  # fmt: skip

    def reference(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * 8**-0.5
        behind = jnp.arange(T)[:, None] - jnp.arange(T)
        scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where((behind >= 0) & (behind < window), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v, precision="highest")

    got = _value_and_grads(fast, q, k, v)
    _assert_close(got, _value_and_grads(reference, q, k, v), tolerance)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_hidden_keys_may_have_the_largest_scores(precision):
    """The maximum that is taken from the scores is that of what a query sees."""
    precision, _ = PRECISIONS[precision]
    q, k, v = _random(6, (2, 140, 2, 8), (2, 140, 2, 8), (2, 140, 2, 8))
    ids_BT = jnp.broadcast_to(jnp.arange(140) // 70, (2, 140))
    # Keys of one segment are those that queries of the other like, a thousand times as much.
    pointing = jnp.ones(8).at[1::2].set(-1)
    side = jnp.where(ids_BT == 0, 1.0, -1.0)[..., None, None]
    q, k = q + 30 * side * pointing, k - 30 * side * pointing
    got = _value_and_grads(
        functools.partial(
            attention.attention, precision=precision, segment_ids_BT=ids_BT,
            implementation="blocked",
        ),
        q, k, v,
    )  # fmt: skip
    mask_BTS = jnp.tril(ids_BT[:, :, None] == ids_BT[:, None, :])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    assert scores.max() > 1e3 > 0 > jnp.where(mask_BTS[:, None], scores, -1e9).max()
    reference = functools.partial(_reference_attention, mask_BTS=mask_BTS)
    wanted = _value_and_grads(reference, q, k, v)
    # In bf16 such scores are off by more than one.
    if precision is F32:
        _assert_close(got, wanted, 2e-3)
    assert all(jnp.isfinite(x).all() for x in got)


@pytest.mark.parametrize("implementation", ["einsum", "blocked"])
def test_attention_with_a_mask(implementation):
    """As with a cache: few queries, more keys, each row its own length."""
    q, k, v = _random(3, (2, 3, 4, 8), (2, 100, 2, 8), (2, 100, 2, 8))
    mask_BTS = jnp.arange(100) <= (jnp.array([[5], [70]]) + jnp.arange(3))[..., None]
    got = attention.attention(
        q, k, v, precision=F32, mask_BTS=mask_BTS, implementation=implementation
    )
    _assert_close([got], [_reference_attention(q, k, v, mask_BTS)], 2e-5)


# A vocabulary of one part, of two, and one that cannot be parted.
@pytest.mark.parametrize(("z_loss", "V"), [(0.0, 11), (1e-2, 11), (1e-2, 40002), (1e-2, 40009)])
def test_cross_entropy(z_loss, V):
    (logits_BTV,) = _random(4, (2, 5, V))
    targets_BT = jnp.arange(10).reshape(2, 5)

    def reference(logits):
        lse_BT = jax.nn.logsumexp(logits, -1)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], -1)[
            ..., 0
        ] + z_loss * jnp.square(lse_BT)

    got = _value_and_grads(lambda x: sum(cross_entropy(x, targets_BT, z_loss)), logits_BTV)
    _assert_close(got, _value_and_grads(reference, logits_BTV), 1e-5)


@pytest.mark.parametrize(("V", "part"), [(32768, 32768), (50257, 1733), (50304, 25152)])
def test_a_large_vocabulary_is_summed_in_parts(V, part):
    """Which XLA:CPU shares between the cores."""
    shapes = jax.ShapeDtypeStruct((1, 2, V), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    text = jax.jit(lambda x, targets: cross_entropy(x, targets)[0]).lower(*shapes).as_text()
    sums = re.findall(r"reduce\(.*?applies stablehlo.add.*?\(tensor<([\dx]+)xf32>", text)
    assert max(int(shape.split("x")[-1]) for shape in sums) == part
