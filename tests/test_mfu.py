"""What a run says of its speed is arithmetic, and looking at it changes nothing."""

import csv
import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel import peaks
from gpt_jax.parallel.peaks import Roof, peak_of_kind, roof_of
from gpt_jax.reports import operations
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.metrics import VOLATILE, read_rows
from gpt_jax.runs.run import open_run
from gpt_jax.runs.state import make_draw
from gpt_jax.scaling.counts import flops_per_token, parameter_counts
from gpt_jax.train import loop, setup
from gpt_jax.train.loop import FINISHED, INTERRUPTED, fit
from gpt_jax.train.progress import Progress
from gpt_jax.train.setup import set_up
from gpt_jax.train.speed import Stopwatch, speed_row

# No biases; two layers of width 16, MLP 64, 4 heads of 4, vocabulary 320.
TINY = TransformerConfig(vocab_size=320, seq_len=64, num_layers=2, embed_dim=16, num_heads=4)
LAYER = 4 * 16 * 16 + 2 * 16 * 64  # weights of q, k, v, out, up, down
HEAD = 16 * 320
SCORES = 2 * 2 * 16 * 64 / 2  # a layer's scores and values, forward, half of 64 keys on average


def changed(**values):
    return dataclasses.replace(TINY, **values)


# The rule.


def test_flops_by_hand():
    assert flops_per_token(TINY, 64) == 6 * (2 * LAYER + HEAD) + 3 * 2 * SCORES
    # MFU: 1,000 tokens a second at a peak of a gigaflop a second.
    row = speed_row(1000.0, flops_per_token(TINY, 64), Roof(1e9, None, ""))
    assert row == {"perf/tokens_per_sec": 1000.0, "perf/mfu": pytest.approx(0.079872)}


def test_causal_attention_is_half_of_an_encoders():
    both_ways = flops_per_token(changed(family="encoder"), 64) - flops_per_token(TINY, 64)
    assert both_ways == 3 * 2 * SCORES
    # Twice as long, twice as much attention, whatever the rest is.
    assert flops_per_token(TINY, 128) - flops_per_token(TINY, 64) == 3 * 2 * SCORES
    # A window of 8 in one of two layers: 8 keys, but for the first 8 tokens 4 on average.
    windowed = changed(window=8, global_layers=(1,))
    saved = flops_per_token(TINY, 64) - flops_per_token(windowed, 64)
    assert saved == pytest.approx(3 * SCORES * (1 - (56 * 8 + 8 * 4) / 64 / 32))


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_frozen_costs_less(scan):
    config = changed(scan=scan, tied=True)
    names = list(_abstract_params(config))
    whole = flops_per_token(config, 64)
    assert flops_per_token(config, 64, trained=names) == whole
    assert flops_per_token(config, 64, trained=()) == whole / 3
    # The embedding, which is the head too: all gradients pass through, none is of a layer.
    alone = flops_per_token(config, 64, trained=["tokens"])
    assert alone == whole - 2 * 2 * LAYER
    # LoRA of rank 2 on all q: 4 a frozen weight, 6 an adapter's, the head is frozen.
    lora = changed(scan=scan, lora_rank=2, lora_targets=("q$",))
    adapters = [name for name in _abstract_params(lora) if "lora_" in name]
    rank = 2 * 2 * (16 + 16)
    assert parameter_counts(lora)["adapters"] == rank
    expected = 4 * (2 * LAYER + HEAD) + 3 * 2 * SCORES + 6 * rank
    assert flops_per_token(lora, 64, trained=adapters) == expected


def test_layers_below_the_first_trained_one_have_no_gradient():
    names = [name for name in _abstract_params(TINY) if "layers_1" in name]
    top = flops_per_token(TINY, 64, trained=[*names, "head"])
    assert top == 2 * LAYER + SCORES + 6 * (LAYER + HEAD) + 3 * SCORES
    head = flops_per_token(TINY, 64, trained=["head"])
    assert head == 2 * 2 * LAYER + 2 * SCORES + 4 * HEAD  # nothing below wants its gradient
    t5 = changed(family="encoder_decoder", num_encoder_layers=2)
    # The encoder reads half as many tokens as the decoder: products, scores, cross attention.
    saved = flops_per_token(t5, 64) - flops_per_token(t5, 64, source_length=32)
    source = 2 * LAYER + 2 * 2 * 16 * 16  # its layers; keys and values of two cross attentions
    assert saved == 6 * source / 2 + 3 * 2 * 2 * SCORES * (3 / 4 + 1 / 2)


def test_a_step_is_counted_by_the_rows_that_its_objective_makes():
    t5 = changed(family="encoder_decoder", num_encoder_layers=2)
    config = SimpleNamespace(model=t5, data=SimpleNamespace(seq_len=48))
    row = {"tokens": np.zeros((1, 16)), "encoder_tokens": np.zeros((1, 40))}
    part = SimpleNamespace(batch=lambda rows: row)
    data = SimpleNamespace(train=SimpleNamespace(parts={"corrupted": part}))
    mask = {name: True for name in _abstract_params(t5)}
    flops = setup._flops_per_token(config, data, mask, None)
    assert flops * 48 == pytest.approx(16 * flops_per_token(t5, 16, source_length=40))
    # A teacher of the same shape runs forward alone.
    teacher = SimpleNamespace(config=t5), None
    assert setup._flops_per_token(config, data, mask, teacher) == pytest.approx(flops * 4 / 3)


def _abstract_params(config):
    return trees.flatten(jax.eval_shape(make_draw(Transformer(config), 0)))


@pytest.mark.parametrize("part", ["", "layers_1/|head"])
def test_the_rule_is_what_xla_counts(part):
    # Wide, so that products weigh; XLA counts all scores, masked or not, as an encoder's.
    config = TransformerConfig(
        vocab_size=320, seq_len=64, num_layers=2, embed_dim=128, num_heads=2,
        attention="einsum", lora_rank=4, lora_targets=("attention/q$",),
    )  # fmt: skip
    model = Transformer(config)
    init = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32)))
    mask = trees.match(part.split("|"), init["params"])
    trained, frozen = (trees.select(init["params"], m) for m in (mask, _inverse(mask)))

    def loss(trained, frozen, tokens):
        logits = model.apply({"params": trees.merge(trained, frozen)}, tokens)
        return jnp.square(logits).sum()

    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, tokens).compile()
    names = [name for name, is_trained in trees.flatten(mask).items() if is_trained]
    both_ways = dataclasses.replace(config, family="encoder")
    rule = 64 * flops_per_token(both_ways, 64, trained=names)
    assert compiled.cost_analysis()["flops"] == pytest.approx(rule, rel=0.08)


def _inverse(mask):
    return jax.tree.map(lambda x: not x, mask)


# The peak.


def test_peaks_are_of_whole_names():
    h100 = peak_of_kind("NVIDIA H100 80GB HBM3")
    assert (h100.bfloat16, h100.float32, h100.memory) == (989e12, 66.9e12, 3.35e12)
    assert peak_of_kind("NVIDIA H100 PCIe").bfloat16 == 756e12
    assert peak_of_kind("TPU v5 lite").bfloat16 == 197e12
    assert peak_of_kind("TPU v5").bfloat16 == 459e12
    assert peak_of_kind("TPU v3").bfloat16 == 61.5e12  # a core is a device there
    assert peak_of_kind("Tesla T4") == peak_of_kind("NVIDIA Tesla T4") == peak_of_kind("T4")
    assert peak_of_kind("NVIDIA L4").memory < peak_of_kind("NVIDIA L40").memory
    for kind in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU",
                 "cpu", "NVIDIA H1000", ""):  # fmt: skip
        assert peak_of_kind(kind) is None, kind


def _mesh(kind, number, platform="gpu"):
    devices = np.empty(number, object)
    devices[:] = [SimpleNamespace(platform=platform, device_kind=kind, process_index=0)] * number
    return SimpleNamespace(devices=devices, size=number)


def test_a_roof_is_of_all_devices_in_the_compute_dtype(tmp_path):
    roof = roof_of(_mesh("NVIDIA H100 80GB HBM3", 4), "float32", tmp_path)
    assert (roof.flops_per_second, roof.bytes_per_second) == (4 * 66.9e12, 4 * 3.35e12)
    roof = roof_of(_mesh("Abacus 1", 4), "bfloat16", tmp_path)
    assert roof.flops_per_second is None and "'Abacus 1'" in roof.source
    assert speed_row(10.0, 1e6, roof) == {"perf/tokens_per_sec": 10.0}


def test_on_cpu_the_best_that_was_measured_is_kept(tmp_path, monkeypatch):
    values = iter([5e9, 7e9, 4e9])
    monkeypatch.setattr(peaks, "measured", lambda dtype: (next(values), 1024))
    roofs = [roof_of(_mesh("cpu", 8, "cpu"), "float32", tmp_path) for _ in range(3)]
    assert [roof.flops_per_second for roof in roofs] == [5e9, 7e9, 7e9]  # of the machine: not by 8
    assert "earlier" in roofs[2].source and "earlier" not in roofs[1].source
    (tmp_path / "roof.json").write_text("{")  # damaged: as if there were none
    monkeypatch.setattr(peaks, "measured", lambda dtype: (1e9, 1024))
    roof = roof_of(_mesh("cpu", 8, "cpu"), "float32", tmp_path)
    assert roof.flops_per_second == 1e9


def test_a_lap_has_the_steps_that_are_done():
    watch = Stopwatch(3)
    assert watch.lap(5)[1] == 2
    first, steps = watch.lap(5)
    assert steps == 0
    seconds, steps = watch.lap(6)
    assert steps == 1 and seconds >= first  # the time without a step is in it


# A run.


def config_for(corpus, **train):
    words = [
        f"data.path={corpus}",
        "data.vocab_size=300",
        "model.num_layers=1",
        "optimizer.name=adamw",
    ]
    train = {
        "duration": 8, "log_every": 1, "eval_every": 4, "eval_batches": 1, "sample_prompts": "()",
        "checkpoint_every": 8, "tensorboard": False, **train,
    }  # fmt: skip
    words += [f"train.{name}={value}" for name, value in train.items()]
    return run_config(load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)[0])


def begin(config, workdir, cache_dir):
    return set_up(config, workdir, cache_dir, jax.devices()[:1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus, cache_dir):
    """(plain, profiled, outputs): the second was interrupted in the middle of its profile."""
    plain, profiled = (tmp_path_factory.mktemp("runs") / name for name in ("plain", "profiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "roof_of", lambda *_: Roof(None, None, "no peak is known"))
        first = begin(config_for(corpus), plain, cache_dir)
        assert fit(first) == FINISHED

    def go_on():
        training = begin(config_for(corpus, profile="3:7"), profiled, cache_dir)
        training.step, training.lower = first.step, first.lower  # compiled once
        return fit(training)

    lines, seen, whole = [], [], Progress.step

    def step(self):
        whole(self)
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "line", lambda self, text: lines.append(text))
        patch.setattr(Progress, "step", step)
        assert go_on() == INTERRUPTED
        tables = {4: _table(profiled)}
        assert go_on() == FINISHED
        tables[8] = _table(profiled)
    return plain, profiled, lines, tables


def _table(workdir):
    folder = workdir / "profile"
    with open(folder / "operations.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t")), (folder / "operations.md").read_text()


def test_every_row_has_its_mfu(runs):
    _, workdir, lines, _ = runs
    receipt = json.loads((workdir / "receipt.json").read_text())
    config = open_run(workdir).config
    flops = flops_per_token(config.model, config.data.seq_len)
    assert receipt["flops_per_token"] == flops and receipt["flops_rule"].startswith("of the model")
    first, second = (session["peak"] for session in receipt["sessions"])
    assert "measured: a product of" in first["source"] and "bfloat16" in first["source"]
    assert second["flops_per_second"] >= first["flops_per_second"] > 1e9
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows if "perf/mfu" not in row] == [1, 5]  # with compilations
    for row in rows:
        if "perf/mfu" in row:
            peak = (first if row["step"] < 5 else second)["flops_per_second"]
            expected = row["perf/tokens_per_sec"] * flops / peak
            assert row["perf/mfu"] == pytest.approx(expected)
        else:
            assert row["perf/first_steps_seconds"] > 0
    assert any("tok/s  mfu " in line and "%" in line for line in lines)


def test_without_a_peak_there_is_no_mfu(runs):
    workdir = runs[0]
    rows = read_rows(workdir / "metrics.jsonl")
    assert any("perf/tokens_per_sec" in row for row in rows)
    assert not any("perf/mfu" in row for row in rows)
    (session,) = json.loads((workdir / "receipt.json").read_text())["sessions"]
    told = {"flops_per_second": None, "bytes_per_second": None, "source": "no peak is known"}
    assert session["peak"] == told


def test_a_profile_changes_no_number(runs):
    plain, profiled, *_ = runs
    ours, theirs = (
        [
            {name: value for name, value in row.items() if not name.startswith(VOLATILE)}
            for row in read_rows(workdir / "metrics.jsonl")
        ]
        for workdir in (profiled, plain)
    )
    # The interruption at 4 met an evaluation that was due: the rows are the same.
    assert ours == theirs
    ours, theirs = (trees.flatten(open_run(workdir).params) for workdir in (profiled, plain))
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_a_profile_is_a_table_of_operations(runs):
    _, workdir, lines, tables = runs
    assert list((workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))
    for last, first, steps in ((4, 3, 2), (8, 5, 2)):
        rows, text = tables[last]
        assert [*rows[0]] == ["name", "kind", "total_ms", "share", "count", "where"]
        times = [float(row["total_ms"]) for row in rows]
        assert times == sorted(times, reverse=True) and times[0] > 0
        assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.02)
        products = [row for row in rows if row["kind"] == "product"]
        forward = [row for row in products if row["where"].startswith("stack/layers_0/mlp/up")]
        assert forward and all(int(row["count"]) == steps for row in forward)
        assert any(row["where"].startswith("backward: stack/layers_0/mlp") for row in products)
        assert f"Operations of steps {first} to {first + steps - 1}" in text
        assert f"| {rows[0]['name']} | {rows[0]['kind']} | " in text
    said = [line for line in lines if line.startswith("profile of steps ")]
    assert [line.split(":")[0] for line in said] == [
        "profile of steps 3 to 4", "profile of steps 5 to 6",
    ]  # fmt: skip
    assert all(line.endswith(str(workdir / "profile" / "operations.md")) for line in said)


def test_steps_that_were_done_before_are_not_profiled(runs, tmp_path):
    lines = []
    profiler = loop.Profiler(range(3, 7), 6, tmp_path, lines.append)
    assert not any(profiler.begins(step) for step in range(7, 20))
    assert lines == ["profile: step 6 was done before; nothing is profiled"]


@pytest.mark.parametrize("text", ["10", "a:b", "-1:3", "10:13:2", "7:7", "7:3", "0:2", "1:500"])
def test_a_profile_that_cannot_be_is_refused(text, corpus):
    with pytest.raises(ValueError, match=rf"^train.profile: '{text}' is not "):
        config_for(corpus, profile=text)


def test_a_profile_after_the_end_is_refused(corpus, cache_dir, tmp_path):
    with pytest.raises(ValueError, match=r"^train.profile: '9:11' begins after the last step, 8"):
        begin(config_for(corpus, profile="9:11"), tmp_path / "run", cache_dir)
    assert not (tmp_path / "run").exists()


# Traces of other devices, by hand.

HLO = """HloModule jit_train_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.0 = f32[] add(%a, %b)
}

%inside (p: bf16[4,8], q: bf16[8,2]) -> f32[4,2] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p, %q), metadata={op_name="jit(train_step)/mlp/up/dot"}
}

ENTRY %main.9 (x: f32[4,2]) -> (f32[4,2], f32[]) {
  %fusion.1 = f32[4,2]{1,0} fusion(%x, %y), kind=kOutput, calls=%inside, metadata={op_name="jit(train_step)/transpose(jvp(Transformer))/stack/layers_0/layers_0._add/attention/attention._attend/dot_general"}
  %gemm.2 = (f32[4,2]{1,0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %all-reduce.3 = f32[4,2]{1,0} all-reduce(%x), to_apply=%sum
  %copy.4 = f32[4,2]{0,1} copy(%x)
  %while.5 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%d
  %kernel.6 = f32[4,2]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %reduce.7 = f32[]{:T(256)} reduce(%x, %z), dimensions={0}, to_apply=%sum
}
"""  # noqa: E501


def test_a_program_tells_what_its_operations_are():
    program = operations.read_program(HLO)
    assert program.module == "jit_train_step"
    kinds = {name: kind for name, kind in program.kinds.items() if "." in name}
    assert kinds == {
        "add.0": "element-wise", "dot.1": "product", "fusion.1": "product", "gemm.2": "product",
        "all-reduce.3": "between devices", "copy.4": "data movement", "while.5": "while",
        "kernel.6": "call of tpu_custom_call", "reduce.7": "reduce",
    }  # fmt: skip
    assert program.wheres["fusion.1"] == "backward: stack/layers_0/attention/dot_general"
    assert program.wheres["dot.1"] == "mlp/up/dot"


def _event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def _trace(line, events, plane="/device:X:0"):
    lines = [SimpleNamespace(name=line, events=events), SimpleNamespace(name="Steps", events=[])]
    host = _event("copy.4", 0, 900.0, hlo_op="copy.4", hlo_module="jit_train_step")
    return SimpleNamespace(
        planes=[
            SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="t", events=[host])]),
            SimpleNamespace(name=plane, lines=lines),
        ]
    )


def test_times_are_without_operations_inside_of_others():
    program = operations.read_program(HLO)

    def run(name, start, duration, module="jit_train_step"):
        return _event("k", start, duration, hlo_op=name, hlo_module=module)

    events = [run("while.5", 0, 100.0), run("fusion.1", 10, 30.0), run("copy.4", 20, 5.0),
              run("fusion.1", 50, 20.0), run("gemm.2", 100, 7.0),
              run("copy.4", 200, 9.0, "jit_eval")]  # fmt: skip
    own = sorted(operations._own_times(_trace("Stream #1", events), program))
    # The host's events are of launches where there is a device.
    assert own == [("copy.4", 5.0), ("fusion.1", 20.0), ("fusion.1", 25.0), ("gemm.2", 7.0),
                   ("while.5", 50.0)]  # fmt: skip
    named = [_event("%fusion.1 = f32[4,2] fusion(...)", 0, 8.0), _event("idle", 9, 1.0)]
    assert list(operations._own_times(_trace("XLA Ops", named), program)) == [("fusion.1", 8.0)]


def test_the_clock_stops_when_the_steps_are_done(tmp_path, corpus, cache_dir, monkeypatch):
    training = begin(
        config_for(corpus, log_every=8, checkpoint_every=2), tmp_path / "run", cache_dir
    )
    whole, ready = training.step, []

    @jax.jit
    def late(step):  # long enough to be under way when the loop goes on
        x = jnp.full((512, 512), step / 512.0)
        x = jax.lax.fori_loop(0, 30, lambda _, x: x @ x * 1e-9, x)
        return step + (x.sum() > 1e30).astype(jnp.int32)  # which it is not

    def step(state, batch, fixed):
        state, values = whole(state, batch, fixed)
        return state.replace(step=late(state.step)), values

    def pause(self):
        ready.append(training.state.step.is_ready())

    monkeypatch.setattr(training, "step", step)
    monkeypatch.setattr(Stopwatch, "pause", pause)
    monkeypatch.setattr(Stopwatch, "lap", lambda self, done: (1.0, 1))
    assert fit(training) == FINISHED
    assert len(ready) > 4 and all(ready)
