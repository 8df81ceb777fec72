"""Meshes agree: losses and gradients of a config on simulated devices."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train import equivalence
from gpt_jax.train.equivalence import MESHES, TOLERANCE, Agreement, compare, table

ROOT = pathlib.Path(__file__).parent.parent


def config_for(*words):
    words = ("model.vocab_size=300", "data.vocab_size=300", "optimizer.name=adamw", *words)
    return run_config(load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)[0])


def _assert_agree(found):
    for one in found:
        assert not one.refusal and one.agrees, one


def test_meshes_agree_on_losses_and_gradients():
    """A window, grouped heads, rows of several documents, microbatches, rematerialization."""
    words = ("model.scan=True", "model.window=9", "model.remat=full", "model.num_kv_heads=1",
             "train.num_microbatches=2", "train.sample_prompts=()")  # fmt: skip
    meshes = ({"fsdp": 2, "sequence": 2, "tensor": 2}, {"data": 2, "stage": 2, "tensor": 2})
    found = list(compare(config_for(*words), 3, meshes))
    _assert_agree(found)
    # One reference for both, which was not the same program.
    assert [one.changes for one in found] == [{}, {}]
    assert all(one.loss > 0 or one.gradient > 0 for one in found)


# What splits a row or the layers, together with other axes, beside the command's list.
MORE = ({"fsdp": 2, "sequence": 2, "stage": 2}, {"data": 2, "sequence": 2, "expert": 2})


def _name(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, *MORE], ids=_name)
def test_every_mesh_agrees(mesh):
    _assert_agree(compare(config_for(), 20, (mesh,)))


def test_what_disagrees_is_named():
    """A gradient that one device has left out of its sum, and a loss that is not a number."""
    grads = {"a": np.ones(4), "b": np.full(4, 2.0)}
    wrong = {**grads, "b": grads["b"] * (1 + 2 * TOLERANCE)}
    losses = np.ones(3)
    found = equivalence._agreement({"data": 2}, {}, (losses, grads), (losses, wrong))
    assert not found.agrees and found.leaf == "b"
    assert found.gradient == pytest.approx(2 * TOLERANCE)
    lost = equivalence._agreement({"data": 2}, {}, (losses, grads), (losses * np.nan, grads))
    lost_gradient = equivalence._agreement(
        {"data": 2}, {}, (losses, grads), (losses, {**grads, "a": grads["a"] * np.nan})
    )
    assert not lost.agrees and not lost_gradient.agrees and lost_gradient.leaf == "a"
    lines = []
    assert not table(iter([found]), lines.append)
    assert "DISAGREES" in lines[-1] and "data 2" in lines[-1]
    fine = dataclasses.replace(found, gradient=0.0)
    refused = Agreement({"stage": 2}, {}, refusal="model.scan: False")
    assert table(iter([fine, refused]), lines.append)
    assert lines[-1].endswith("refused: model.scan: False")
    assert not table(iter([refused]), lines.append)  # nothing was compared


def test_what_does_not_run_on_a_mesh_is_told_and_what_needs_data_is_refused():
    (found,) = compare(config_for("data.seq_len=30"), 1, ({"sequence": 4},))
    assert found.refusal.startswith("data.seq_len: 30 is not a multiple of mesh.sequence 4")
    task = config_for("tasks.names=('sst2',)", "train.sample_prompts=()")
    with pytest.raises(ValueError, match=r"^objective\.name: "):
        list(compare(task, 1, ({"data": 2},)))


def test_a_gradient_that_is_zero_but_for_rounding_is_measured_by_the_whole():
    grads = {"a": np.ones(4), "zero": np.full(4, 1e-9)}
    other = {**grads, "zero": np.full(4, -1e-9)}
    found = equivalence._agreement({}, {}, (np.ones(1), grads), (np.ones(1), other))
    assert found.agrees and found.gradient > 0


@pytest.mark.slow
def test_the_command_runs_and_its_exit_code_tells():
    words = ["-m", "gpt_jax", "preflight", "--equivalence", "--steps=2"]
    words += ["--config=configs/gpt.py:size=100k,debug", "--config.optimizer.name=adamw"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("e-0") + done.stdout.count("0.0e+00") >= 2 * len(MESHES)
