"""Preflight: names of slices, what programs send, the step without data, what fits instead."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_FOR_USERS, ROOT
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.cli.main import main
from gpt_jax.parallel import cache_folder, topologies
from gpt_jax.parallel.collectives import collectives
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.parallel.topologies import larger, parse_topology
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train import preflight
from gpt_jax.train.ahead_of_time import abstract_run, bytes_on_a_device, compile_step
from gpt_jax.train.preflight import Flight, fly, larger_fit, nearest_fit, report, with_fields
from gpt_jax.train.setup import set_up


@pytest.mark.parametrize(
    "name, shape, slices",
    [
        ("v5e-16", (4, 4), 1),
        ("v5e-8", (2, 4), 1),
        ("v6e-256", (16, 16), 1),
        ("v4-512", (4, 8, 8), 1),
        ("v4-8", (2, 2, 1), 1),
        ("v5p-128", (4, 4, 4), 1),
        ("2xv5e-256", (16, 16), 2),
    ],
)
def test_names_of_slices(name, shape, slices):
    topology = parse_topology(name)
    assert (topology.shape, topology.slices) == (shape, slices)


@pytest.mark.parametrize("name", ["v5e-3", "v5e-512", "v9-8", "16", "v4-4", "0xv5e-16", "v5e-2"])
def test_no_such_slice(name):
    with pytest.raises(ValueError, match=f"--topology: '{name}'"):
        parse_topology(name)


def test_larger_slices():
    assert [t.name for t in larger(parse_topology("v5e-32"))] == ["v5e-64", "v5e-128", "v5e-256"]
    assert [t.name for t in larger(parse_topology("2xv5e-128"))] == ["2xv5e-256"]
    names = [t.name for t in larger(parse_topology("v4-1024"))]
    assert names == ["v4-2048", "v4-4096"]
    assert list(larger(parse_topology("v6e-256"))) == []


# What a program sends.


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def compiled(mesh, fn, *arrays, out):
    """The text of fn; each array is (shape, spec)."""
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in arrays
    ]
    out = NamedSharding(mesh, PartitionSpec(*out))
    return jax.jit(fn, out_shardings=out).lower(*args).compile().as_text()


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_a_gather_is_of_its_axis(mesh, axis):
    text = compiled(mesh, lambda x: x, ((64, 32), (axis,)), out=())
    (row,) = collectives(text, mesh)
    assert (row.axes, row.kind, row.count) == ((axis,), "all-gather", 1)
    assert row.bytes == 64 * 32 * 4 / 2  # of two devices each sends its half


def test_a_sum_over_two_axes_sends_twice_the_rest(mesh):
    arrays = ((16, 64), (None, ("data", "tensor"))), ((64, 8), (("data", "tensor"),))
    text = compiled(mesh, lambda x, y: x @ y, *arrays, out=())
    (row,) = collectives(text, mesh)
    assert (row.axes, row.kind) == (("data", "tensor"), "all-reduce")
    assert row.bytes == 2 * 16 * 8 * 4 * 3 / 4


def test_what_is_in_a_loop_counts_as_often_as_it_runs(mesh):
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def fn(x, w):
        def body(_, x):  # each time partial sums are added up
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split)

        return jax.lax.fori_loop(0, 7, body, x)

    arrays = ((8, 32), (None, "fsdp")), ((32, 32), ("fsdp", None))
    text = compiled(mesh, fn, *arrays, out=(None, "fsdp"))
    assert sum(row.count for row in collectives(text, mesh) if row.axes == ("fsdp",)) == 7


# The step.


def config_for(*words):
    return run_config(load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)[0])


@pytest.fixture(scope="module")
def config():
    words = ("mesh.data=2", "mesh.fsdp=4", "data.vocab_size=300", "model.vocab_size=300")
    return config_for(*words, "train.num_microbatches=1", "optimizer.name=adamw")


@pytest.fixture(scope="module")
def step(config):
    return compile_step(config, jax.devices())


def test_the_state_without_arrays_is_that_of_a_run(config, step, corpus, cache_dir, tmp_path):
    values = config.to_dict()
    values["data"]["path"] = str(corpus)
    training = set_up(run_config(values), tmp_path / "run", cache_dir)
    live = bytes_on_a_device(training.state)
    on_first = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(training.state)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert step.state_bytes == live == on_first
    # Beside the state there is the batch alone.
    batch = 5 * config.train.batch_size * config.data.seq_len * 4 / 8
    assert step.argument_bytes == pytest.approx(live + batch, rel=0.02)
    assert step.flops_per_token == training.flops_per_token
    for part in (training.lock, training.checkpoints):
        part.close()


@pytest.mark.parametrize(
    "file",
    ["pretrain_bert.py", "pretrain_t5.py:size=small",
     *(pytest.param(f"pretrain_gpt.py:objective={name}", marks=pytest.mark.slow)
       for name in ("prefix_lm", "permutation_lm", "fill_in_the_middle"))],
)  # fmt: skip
def test_batches_without_data_are_those_of_the_objective(file):
    name, colon, argument = file.partition(":")
    spec = f"{ROOT / 'configs' / name}:{argument}{',' if colon else ''}debug"
    config = run_config(load_config(spec, ("mesh.data=1", "train.num_microbatches=1"))[0])
    assert jax.tree.leaves(abstract_run(config, jax.devices()[:1]).state)
    assert compile_step(config, jax.devices()[:1]).temporary_bytes > 0


def test_teachers_need_their_data():
    values = config_for().to_dict()
    values["objective"] |= {"name": "distillation", "teacher": "somewhere"}
    with pytest.raises(ValueError, match=r"objective.name: 'distillation' .* only the data tell"):
        compile_step(run_config(values), jax.devices())


# The report.


@pytest.fixture(scope="module")
def flight(config, step):
    sent = tuple(collectives(step.executable.as_text(), step.mesh))
    return Flight(parse_topology("v5e-8"), config, step, sent=sent)


def test_a_report_says_what_holds_a_step(flight):
    text = "\n".join(report(flight, price=1.5))
    assert "v5e-8: 8 chips (TPU v5 lite), mesh data 2, fsdp 4" in text
    assert f"{flight.step.state_bytes / 2**30:8.2f} GiB" in text
    assert "communication-bound" in text and "all-reduce" in text  # so small a model
    assert f"{20:,} steps" in text and "to pay" in text


def test_seconds_by_hand(flight):
    flops = flight.step.flops_per_token * flight.tokens_per_step
    assert flight.compute_seconds() == pytest.approx(flops / (8 * 197e12), rel=1e-6)
    sent = sum(row.bytes for row in flight.sent)
    assert flight.network_seconds() == pytest.approx(sent / 200e9)
    slow = dataclasses.replace(flight, topology=parse_topology("2xv5e-4"))
    assert slow.network_seconds() > flight.network_seconds()  # what crosses slices is slower


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_computed_again_is_no_useful_work(remat):
    config = config_for("model.scan=True", f"model.remat={remat}", "mesh.data=1")
    c, length = config.model, config.data.seq_len
    step = compile_step(config, jax.devices()[:1])
    head = 2 * c.embed_dim * c.vocab_size
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * length / 2 * 2
    again = {"none": 0, "dots": attention, "full": step.flops_per_token / 3 - head}[remat]
    assert step.recomputed_flops_per_token == pytest.approx(again, rel=1e-6)
    flight = Flight(parse_topology("v5e-4"), config, step)
    useful = step.flops_per_token * flight.tokens_per_step / (4 * 197e12)
    assert flight.useful_seconds() == pytest.approx(useful)
    assert flight.compute_seconds() == pytest.approx(useful * (1 + again / step.flops_per_token))
    share = f"MFU {useful / flight.step_seconds():.0%},"
    assert share in "\n".join(report(flight)) and ("MFU 100%" in share) == (remat == "none")


def test_what_no_change_makes_fit_is_tried_on_larger_slices(config, monkeypatch):
    lines, compiled = [], []

    def compile_stub(config, devices):
        compiled.append(len(devices))
        return compile_step(config, devices)

    def devices_of(topology):
        return jax.devices()[: min(8, topology.num_chips // 4)]

    monkeypatch.setattr(preflight, "compile_step", compile_stub)
    run = abstract_run(with_fields(config, {"mesh.data": 1}), jax.devices()[:4])
    needed = run.state_bytes + bytes_on_a_device(run.state.params)  # and its gradient
    chip = dataclasses.replace(preflight.CHIPS["v5e"], hbm=needed * 3 // 4)
    monkeypatch.setattr(preflight, "CHIPS", {"v5e": chip})
    small = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=64))
    change, flight = larger_fit(small, parse_topology("v5e-8"), devices_of, lines.append)
    # 16 chips (here 4 devices) hold it not, 32 (here 8) do; each of those has two rows.
    assert compiled == [8] and flight.topology.name == "v5e-32" and flight.step is not None
    assert change["mesh.fsdp"] == -1 and change["train.num_microbatches"] == 1
    assert lines[0].startswith("  v5e-16 ")
    assert ": does not fit: the state and the gradient alone are" in lines[0]
    assert lines[1].startswith("  v5e-32 ") and lines[1].endswith("fits")
    refused = fly(with_fields(small, {"mesh.data": 1}), parse_topology("v5e-16"), jax.devices()[:4])
    assert refused.step is None and "the gradient alone" in refused.refusal and len(compiled) == 1
    monkeypatch.setattr(preflight, "CHIPS", {"v5e": dataclasses.replace(chip, hbm=1)})
    assert larger_fit(small, parse_topology("v5e-8"), devices_of, lines.append) is None


def test_what_does_not_fit_is_tried_with_less(config, monkeypatch):
    tried = []

    def compile_stub(config, devices):
        tried.append(config)
        if config.mesh.fsdp != 8 and config.mesh.fsdp != -1:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
                "space hbm. Used 158.27G of 15.75G hbm."
            )
        return compile_step(config, devices)

    monkeypatch.setattr(preflight, "compile_step", compile_stub)
    topology, lines = parse_topology("v5e-8"), []
    first = fly(config, topology, jax.devices())
    assert first.step is None and "needs 158.27G of a device's 15.75G" in first.refusal
    change, found = nearest_fit(config, topology, jax.devices(), lines.append)
    assert change["mesh.fsdp"] == -1 and found.step is not None
    assert [c.model.remat for c in tried] == ["none", "full", "none"]  # the cheapest first
    assert any("fits" in line for line in lines)
    monkeypatch.setattr(
        preflight, "CHIPS", {"v5e": dataclasses.replace(preflight.CHIPS["v5e"], hbm=1)}
    )
    assert nearest_fit(config, topology, jax.devices(), lines.append) is None
    assert "the state and the gradient alone are" in lines[-1]


def test_what_is_as_it_was_is_not_compiled_again(config, monkeypatch):
    tried = []

    def refuse(config, topology, devices):
        tried.append(config)
        return Flight(topology, config, None, "does not fit")

    monkeypatch.setattr(preflight, "_compiled", refuse)
    split = with_fields(config, {"mesh.data": 1, "mesh.fsdp": -1, "model.remat": "full"})
    split = with_fields(split, {"model.scan": True})
    assert nearest_fit(split, parse_topology("v5e-8"), jax.devices(), lambda line: None) is None
    assert tried and split not in tried
    assert all(one not in tried[:i] for i, one in enumerate(tried))


def test_fields_are_changed_by_name(config):
    changed = with_fields(config, {"mesh.fsdp": 8, "model.remat": "full"})
    assert (changed.mesh.fsdp, changed.model.remat) == (8, "full")
    assert with_fields(config, {}) == config


def test_mistakes_at_the_command(capsys):
    file = str(ROOT / "configs" / "gpt.py")
    for words, told in (
        (["--topology=v5e-7"], "--topology: 'v5e-7'"),
        (["--topology=v5e-8", "--price_per_chip_hour=-1"], "--price_per_chip_hour: -1.0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["preflight", f"--config={file}", *words])
        assert stopped.value.code == 2 and told in capsys.readouterr().err


# Compiles a step, then takes it: what was foretold, and what the process grew by.
_MEASURE = """
import gc, json, sys, time
import jax
from gpt_jax.data.pipeline import train_batches
from gpt_jax.parallel import sharding
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train.ahead_of_time import compile_step
from gpt_jax.train.setup import set_up

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

workdir, cache, *words = sys.argv[1:]
config, devices = run_config(load_config("configs/gpt.py:size=1m", words)[0]), jax.devices()[:1]
told = compile_step(config, devices)
t = set_up(config, workdir, cache, devices)
local = sharding.local_rows(config.train.batch_size, t.mesh)
batches = train_batches(t.data.train, 0, config.train.batch_size, 0, local)
for _ in range(3):
    arrays = sharding.global_batch(next(batches)[1], local, config.train.batch_size, t.mesh)
    jax.block_until_ready(t.state)
    time.sleep(1)  # temporaries are given back a little later
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest so far begins anew
    t.state, _ = t.step(t.state, arrays, t.fixed)
    jax.block_until_ready(t.state)
    grown = memory("VmHWM") - before
gc.collect()
live = sum(x.nbytes for x in jax.live_arrays())
print(json.dumps([told.argument_bytes, live, told.temporary_bytes, grown]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="asks Linux for memory")
def test_the_memory_of_a_step_is_as_foretold(corpus, cache_dir, tmp_path):
    """On CPU, the live arrays and the highest memory of the process in the third step."""
    words = [
        f"data.path={corpus}", "data.tokenizer=bytes", "model.vocab_size=8192", "data.seq_len=256",
        "model.seq_len=256", "model.embed_dim=512", "model.num_heads=8", "model.num_layers=4",
        "train.batch_size=8", "train.num_microbatches=1", "train.duration=4",
        "optimizer.name=adamw", "train.tensorboard=false",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "run"), str(cache_dir), *words], cwd=ROOT,
        env=AS_FOR_USERS, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, live, temporary, grown = json.loads(done.stdout.splitlines()[-1])
    print(f"\nMiB: arguments {arguments / 2**20:.1f}, live {live / 2**20:.1f}; temporaries "
          f"{temporary / 2**20:.1f}, grown by {grown / 2**20:.1f}")  # fmt: skip
    assert live == pytest.approx(arguments, rel=0.15)
    assert grown == pytest.approx(temporary, rel=0.15)


def test_the_compiler_is_fetched_once_and_whole(tmp_path, monkeypatch, capsys):
    started = []

    def pip(command, **_):
        started.append(command)
        if len(started) > 1:
            folder = pathlib.Path(command[command.index("--target") + 1]) / "libtpu"
            folder.mkdir()
            (folder / "libtpu.so").write_text("")
        error = "" if len(started) > 1 else "a first line\nERROR: no network"
        return subprocess.CompletedProcess(command, 1, "", error)

    monkeypatch.setattr(topologies.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"--topology: libtpu.* not be fetched: ERROR: no network"):
        topologies._library(tmp_path)
    library = topologies._library(tmp_path)
    assert library.exists() and topologies._library(tmp_path) == library
    assert len(started) == 2 and started[0][-1].startswith("libtpu==")
    assert [path.name for path in library.parent.parent.parent.iterdir()] == [
        library.parent.parent.name  # nothing that was half fetched
    ]
    assert capsys.readouterr().out.count("fetching libtpu") == 2


@pytest.mark.slow
def test_a_tpu_is_compiled_for():
    """Fetches the TPU compiler from the package index, unless the user's cache has it."""
    config = config_for("mesh.data=2", "mesh.fsdp=2", "train.num_microbatches=1")
    topology = parse_topology("v5e-4")
    try:
        devices = topologies.devices(topology, cache_folder.cache_dir())
    except ValueError as error:
        pytest.skip(str(error))
    found = fly(config, topology, devices)
    assert found.step is not None and np.isfinite(found.step_seconds())
    assert {axis for row in found.sent for axis in row.axes} <= {"data", "fsdp"}
