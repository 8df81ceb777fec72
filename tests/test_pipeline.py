"""Layers as stages of a pipeline: the axis `stage`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.decode.engine import Engine
from gpt_jax.models.layer_kinds import LayerKind
from gpt_jax.models.layers import Context
from gpt_jax.models.pipeline import pipelined
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel.collectives import collectives
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.state import abstract_on_mesh
from gpt_jax.train.ahead_of_time import compile_step
from gpt_jax.train.mesh_checks import check_mesh

ROOT = pathlib.Path(__file__).parent.parent
L, B, T, D = 4, 6, 3, 5


def config_for(*words):
    fixed = ("mesh.data=1", "mesh.stage=2", "model.scan=True", "train.sample_prompts=()",
             "optimizer.name=adamw", "model.vocab_size=300", "data.vocab_size=300")  # fmt: skip
    words = [*fixed, *words]
    return run_config(load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)[0])


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 3), (4, 1)])
def test_a_pipeline_is_one_layer_after_another(stages, microbatches):
    """What differs by row, by layer and not at all reaches every layer as it should."""
    rng = np.random.default_rng(0)
    w_L, x = rng.normal(size=(L, D, D)).astype("f4"), rng.normal(size=(B, T, D)).astype("f4")
    segments = rng.integers(0, 9, (B, T)).astype(np.int32)
    tables = rng.normal(size=(B, T, 1, 1)).astype("f4"), np.float32(2) * np.ones((1, T, 1, 1), "f4")
    context = Context(segments, None, tables, None, None, None, None, causal=True, platform="cpu")
    kinds = LayerKind(window=np.arange(L, dtype=np.int32), rotary=None)

    def layer(w, x, context, kind, key):
        rows, shared = context.rotary
        x = jnp.tanh(x @ w) + rows[..., 0] * shared[..., 0] * context.segment_ids_BT[..., None]
        return x * (1 + kind.window)

    def plain(w_L, x):
        for i in range(L):
            x = layer(w_L[i], x, context, LayerKind(kinds.window[i], None), None)
        return x

    def piped(w_L, x):
        return pipelined(
            layer, w_L, x, context, kinds, None, num_stages=stages, num_microbatches=microbatches
        )

    for got, wanted in zip(
        jax.jit(jax.value_and_grad(lambda w, x: piped(w, x).sum() ** 2, (0, 1)))(w_L, x)[1],
        jax.jit(jax.value_and_grad(lambda w, x: plain(w, x).sum() ** 2, (0, 1)))(w_L, x)[1],
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-3 * np.abs(wanted).max())
    np.testing.assert_allclose(jax.jit(piped)(w_L, x), plain(w_L, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_each_device_holds_its_layers_and_sends_what_they_give():
    config = config_for()
    devices = jax.devices()[:2]
    kernel = abstract_on_mesh(Transformer(config.model, "cpu"), make_mesh(config.mesh, devices))
    kernel = kernel["stack"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, *kernel.shape[1:])
    step = compile_step(config, devices)
    sent = collectives(step.executable.as_text(), step.mesh)
    assert any((row.axes, row.kind) == (("stage",), "collective-permute") for row in sent)
    width = config.model.embed_dim * config.model.mlp_dim * 4
    gathers = [row for row in sent if row.kind == "all-gather"]
    assert all(row.bytes / row.count < width for row in gathers), gathers  # no layer is fetched


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.scan=False"], "model.scan: False"),
        (["model.num_layers=3"], "mesh.stage: 2 does not divide model.num_layers 3"),
        (["model.num_experts=2"], "model.num_experts: 2"),
        (["train.sample_prompts=('a',)"], "train.sample_prompts: ('a',)"),
    ],
)
def test_what_has_no_stages_is_refused(words, told):
    config = config_for(*words)
    with pytest.raises(ValueError) as refusal:
        check_mesh(config, make_mesh(config.mesh, jax.devices()[:2]))
    assert str(refusal.value).startswith(told)


def test_stages_do_not_decode():
    config = config_for()
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    model = Transformer(config.model, "cpu")
    params = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        abstract_on_mesh(model, mesh),
    )
    with pytest.raises(ValueError, match=r"^mesh\.stage: 2 stages do not decode"):
        Engine(model, params, eos_ids=(0,))
