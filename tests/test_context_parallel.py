"""Rows whose tokens lie on several devices: the axis `sequence`."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.ops import attention, products
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train.ahead_of_time import compile_step
from gpt_jax.train.mesh_checks import check_mesh

ROOT = pathlib.Path(__file__).parent.parent
F32 = products.precision("float32", "cpu")
B, T, N, K, H = 2, 24, 4, 2, 8


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, tensor=2, sequence=4))


def _config(*words):
    config = load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)[0]
    return run_config(config)


_RNG = np.random.default_rng(0)
_SEGMENTS = np.sort(_RNG.integers(0, 3, (B, T)), axis=1).astype(np.int32)
_MASK = _RNG.random((B, T, 2 * T)) < 0.5
FORMS = {
    "window": {"segment_ids_BT": _SEGMENTS, "window": np.int32(5)},
    "another row's keys": {"causal": False, "mask_BTS": _MASK},
    "bias and cap": {"bias_BNTS": _RNG.normal(size=(1, N, T, T)).astype("f4"), "softcap": 2.0},
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_over_devices_is_attention(mesh, form):
    given = FORMS[form]
    S = given["mask_BTS"].shape[2] if "mask_BTS" in given else T
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    q, k, v, g = (_RNG.normal(size=shape).astype(np.float32) for shape in shapes)

    def run(implementation, arrays, given):
        def loss(q, k, v, given):
            causal = given.get("causal", True)
            how = {"causal": causal, "softcap": 2.0 if "softcap" in given else 0.0}
            rest = {name: x for name, x in given.items() if name not in how}
            out = attention.attention(
                q, k, v, precision=F32, implementation=implementation, **how, **rest
            )
            return (out * g).sum(), out

        fn = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        statics = {name: x for name, x in given.items() if name in ("causal", "softcap")}
        rest = {name: x for name, x in given.items() if name not in statics}
        return jax.jit(lambda arrays, rest: fn(*arrays, statics | rest))(arrays, rest)

    (_, expected), expected_grads = run("einsum", (q, k, v), given)
    by_heads = NamedSharding(mesh, PartitionSpec(None, "sequence", "tensor"))
    placed = tuple(jax.device_put(x, by_heads) for x in (q, k, v))
    with jax.set_mesh(mesh):
        (_, out), grads = run("chunked", placed, given)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_chunks_of_one_device_are_attention():
    """Three chunks, the last one filled up."""
    shapes = [(2, 300, N, H), (2, 300, K, H), (2, 300, K, H)]
    q, k, v = (_RNG.normal(size=shape).astype(np.float32) for shape in shapes)
    segments = np.sort(_RNG.integers(0, 3, (2, 300)), axis=1).astype(np.int32)

    def run(implementation):
        attend = functools.partial(
            attention.attention, precision=F32, segment_ids_BT=segments, window=np.int32(150),
            implementation=implementation,
        )  # fmt: skip
        loss = lambda q, k, v: (jnp.sin(attend(q, k, v)).sum(), attend(q, k, v))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run("chunked"), run("einsum")
    )


def test_each_device_attends_from_its_share(mesh):
    """Of the scores a device computes its heads and its queries, for all keys."""
    spec = NamedSharding(mesh, PartitionSpec(None, "sequence", "tensor"))
    shapes = [jax.ShapeDtypeStruct((B, T, N, H), jnp.float32, sharding=spec)] * 3
    attend = functools.partial(attention.attention, precision=F32, implementation="chunked")
    with jax.set_mesh(mesh):
        text = jax.jit(attend).lower(*shapes).compile().as_text()
    assert f"f32[{B},{N // 2},{T // 4},{T}]" in text
    assert f"f32[{B},{N // 2},{T},{T}]" not in text and f"f32[{B},{N},{T},{T}]" not in text


def test_a_batch_lies_with_its_tokens_over_the_devices():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    rows = sharding.local_rows(4, mesh)
    host = {"tokens": np.arange(32).reshape(4, 8), "targets": np.arange(4)}
    placed = sharding.global_batch(host, rows, 4, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, host[name])
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 2)
    assert placed["targets"].addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data.seq_len=30",), r"^data\.seq_len: 30 is not a multiple of mesh\.sequence 4"),
        (("model.attention=xla",), r"^model\.attention: 'xla' does not attend over mesh\.sequence"),
    ],
)
def test_what_cannot_be_split_is_refused(words, told):
    config = _config("mesh.data=2", "mesh.sequence=4", *words)
    with pytest.raises(ValueError, match=told):
        check_mesh(config, make_mesh(config.mesh))


@pytest.mark.slow
def test_long_rows_take_less_memory_of_a_device():
    """8 rows of 8192 tokens, once a row a device and once an eighth of each row."""
    words = ("model.seq_len=8192", "data.seq_len=8192", "train.num_microbatches=1",
             "model.num_layers=1", "optimizer.name=adamw", "model.vocab_size=320",
             "data.vocab_size=320", "model.scan=True", "model.remat=full")  # fmt: skip
    by_rows = compile_step(_config(*words, "mesh.data=8"), jax.devices())
    by_tokens = compile_step(_config(*words, "mesh.data=1", "mesh.sequence=8"), jax.devices())
    assert by_tokens.peak_bytes < 0.7 * by_rows.peak_bytes, (by_tokens, by_rows)
    # One row alone: what no other axis can split.
    one = dataclasses.replace(_config(*words), mesh=MeshConfig(data=1, sequence=8))
    one = dataclasses.replace(one, train=dataclasses.replace(one.train, batch_size=1))
    split = compile_step(one, jax.devices())
    whole = compile_step(dataclasses.replace(one, mesh=MeshConfig(data=1)), jax.devices()[:1])
    assert split.peak_bytes < whole.peak_bytes / 8, (split, whole)
