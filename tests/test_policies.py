"""What follows a loss that is not finite: nothing of it is kept, killed or not."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.objectives.config import ObjectiveConfig
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.optim.adam import scale_by_adam
from gpt_jax.runs import ledger
from gpt_jax.runs.checkpoints import Checkpoints
from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.identity import config_sha
from gpt_jax.runs.metrics import VOLATILE, read_rows
from gpt_jax.runs.state import NUM_LOSSES, TrainState, first_flags
from gpt_jax.train.loop import FINISHED, INTERRUPTED, NonFiniteError, fit
from gpt_jax.train.setup import set_up
from gpt_jax.train.step import train_step

OVERRIDES = (
    "model.embed_dim=8", "model.num_heads=2", "model.num_kv_heads=2", "model.mlp_dim=16",
    "model.num_layers=1", "model.seq_len=16", "data.seq_len=16", "data.tokenizer=bytes",
    "model.vocab_size=320", "train.duration=12", "train.batch_size=2", "train.num_microbatches=1",
    "train.log_every=1", "train.eval_every=12", "train.eval_batches=1", "train.sample_prompts=()",
    "train.checkpoint_every=3 steps", "train.tensorboard=false",
)  # fmt: skip


def config_for(corpus, *overrides):
    words = (f"data.path={corpus}", *OVERRIDES, *overrides)
    values, _ = load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)
    return run_config(values)


class Killed(BaseException):
    """In the place of a signal that ends the process."""


def begin(config, workdir, cache_dir, poisoned, killed_at=None, signalled_at=None):
    """A run whose batches of the indices `poisoned` give a loss that is not a number."""
    training = set_up(config, workdir, cache_dir, jax.devices()[:1])
    whole, calls = training.step, [0]

    def step(state, batch, fixed):
        if calls[0] == killed_at:
            raise Killed
        if calls[0] == signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)
        calls[0] += 1
        if int(state.index) in poisoned:
            batch = {**batch, "loss_mask": batch["loss_mask"] * np.nan}
        return whole(state, batch, fixed)

    training.step = step
    return training


def settled(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def final_state(training):
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), training.state
    )
    checkpoints = Checkpoints(training.checkpoints.directory, keep=2)
    try:
        state, _, step = checkpoints.newest_good(like)
    finally:
        checkpoints.close()
    return trees.flatten(jax.device_get(state)), step


def test_skip_goes_on_and_rows_count(corpus, cache_dir, tmp_path):
    config = config_for(corpus, "train.on_nonfinite=skip")
    training = begin(config, tmp_path / "run", cache_dir, {4, 7})
    assert fit(training) == FINISHED
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 5
    state, step = final_state(training)
    assert step == state["step"] == state["index"] == 12 and state["flags/skipped"] == 2
    assert next(state[x] for x in state if x.endswith("count")) == 10
    assert ledger.ledger_row(tmp_path / "run")["status"] == ledger.FINISHED


def test_too_many_in_a_row_halt(corpus, cache_dir, tmp_path):
    config = config_for(corpus, "train.on_nonfinite=skip", "train.duration=20")
    with pytest.raises(NonFiniteError, match=r"step 13: .* checkpoint is 12"):
        fit(begin(config, tmp_path / "run", cache_dir, set(range(2, 20))))
    row = ledger.ledger_row(tmp_path / "run")
    assert row["status"] == ledger.DIVERGED


def test_a_rewind_moves_past_the_batches_and_is_the_same_when_killed(corpus, cache_dir, tmp_path):
    config = config_for(corpus, "train.on_nonfinite=rewind")
    poisoned = {7, 9}  # the second on the way from the same checkpoint
    whole = begin(config, tmp_path / "whole", cache_dir, poisoned)
    assert fit(whole) == FINISHED
    rows = settled(tmp_path / "whole")
    events = [row for row in rows if row.get("event") == "rewind"]
    assert [(r["step"], r["event/first_batch"], r["event/last_batch"]) for r in events] == [
        (6, 6, 7), (6, 8, 9)
    ]  # fmt: skip
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert all(isinstance(row["train/loss"], float) for row in rows if "train/loss" in row)
    (session,) = json.loads((tmp_path / "whole" / "receipt.json").read_text())["sessions"]
    assert [x["skipped_batches"] for x in session["rewinds"]] == [[6, 7], [8, 9]]
    expected, step = final_state(whole)
    assert step == 12 and expected["index"] == 16

    # Killed after the second rewind, before another checkpoint; or asked to save before the first,
    # so that there is a newer checkpoint than the one that an undisturbed run goes back to.
    with pytest.raises(Killed):
        fit(begin(config, tmp_path / "killed", cache_dir, poisoned, killed_at=13))
    asked = begin(config, tmp_path / "asked", cache_dir, poisoned, signalled_at=6)
    assert fit(asked) == INTERRUPTED
    for name, start in (("killed", 6), ("asked", 7)):
        again = begin(config, tmp_path / name, cache_dir, poisoned)
        assert again.start == start
        assert fit(again) == FINISHED
        assert settled(tmp_path / name) == rows
        state, _ = final_state(again)
        for leaf, value in expected.items():
            np.testing.assert_array_equal(state[leaf], value, err_msg=f"{name} {leaf}")


def test_rewinds_come_to_an_end(corpus, cache_dir, tmp_path):
    config = config_for(corpus, "train.on_nonfinite=rewind")
    with pytest.raises(NonFiniteError, match="went back to checkpoint 3 3 times"):
        fit(begin(config, tmp_path / "run", cache_dir, set(range(4, 40))))
    session = json.loads((tmp_path / "run" / "receipt.json").read_text())["sessions"][-1]
    assert len(session["rewinds"]) == 3 and session["first_nonfinite"] == 4
    # Where nothing is saved yet there is nothing to go back to; the same command may skip instead.
    with pytest.raises(NonFiniteError, match="no checkpoint was saved"):
        fit(begin(config, tmp_path / "other", cache_dir, {1}))


def test_a_halted_run_is_diverged_and_may_go_on_by_another_policy(corpus, cache_dir, tmp_path):
    with pytest.raises(NonFiniteError):
        fit(begin(config_for(corpus), tmp_path / "run", cache_dir, {7}))
    assert ledger.ledger_row(tmp_path / "run")["status"] == ledger.DIVERGED
    skipping = config_for(corpus, "train.on_nonfinite=skip")
    assert fit(begin(skipping, tmp_path / "run", cache_dir, {7})) == FINISHED
    assert ledger.ledger_row(tmp_path / "run")["status"] == ledger.FINISHED


def _step_of(monkeypatch, sigma, most_skipped=10**6):
    """The step of a model of one number w, whose loss is w times the batch's x; its first state."""
    monkeypatch.setattr(
        "gpt_jax.train.step.forward_training",
        lambda model, params, batch, key=None: (params["w"], {}),
    )
    objective = dataclasses.replace(
        make_objective(ObjectiveConfig(name="causal_lm")),
        loss=lambda w, batch: (loss := batch["x"] * w, {"loss": loss}),
        count=lambda batch: jnp.float32(1),
    )
    optimizer = optax.chain(scale_by_adam(0.9, 0.99, 1e-8), optax.scale(-1e-6))
    params = {"w": jnp.float32(1)}
    state = TrainState(
        step=jnp.int32(0), index=jnp.int32(0), params=params, opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(0)), flags=first_flags(),
    )  # fmt: skip

    @jax.jit
    def step(state, x):
        batch = {"x": x, "segment_ids": jnp.ones((1, 1))}
        return train_step(
            state, batch, model=None, objective=objective, optimizer=optimizer,
            most_skipped=most_skipped, spike_sigma=sigma,
        )  # fmt: skip

    return step, state


def test_spikes_are_left_out_to_the_bit_and_are_no_part_of_the_statistics(monkeypatch):
    step, state = _step_of(monkeypatch, sigma=6.0)
    rng, losses = np.random.default_rng(0), []
    for i in range(300):
        spike = i in (20, 150, 151, 290) or i == 200
        x = np.float32(np.nan if i == 200 else 3.0 if spike else 1 + 0.05 * rng.standard_normal())
        before = state
        expected = np.asarray(losses[-NUM_LOSSES:])
        state, metrics = step(state, x)
        left_out = int(state.flags["skipped"]) > int(before.flags["skipped"])
        assert left_out == (spike and i != 20)  # too early to tell at 20
        if left_out:
            for old, new in zip(
                jax.tree.leaves((before.params, before.opt_state)),
                jax.tree.leaves((state.params, state.opt_state)),
                strict=True,
            ):
                np.testing.assert_array_equal(old, new)
        else:
            losses.append(float(metrics["loss"]))
            known = np.sort(np.asarray(state.flags["losses"])[: len(losses)])
            np.testing.assert_array_equal(known, np.sort(losses[-NUM_LOSSES:]).astype(np.float32))
        assert np.isfinite(np.asarray(state.flags["losses"])).all() and len(expected) <= NUM_LOSSES
    assert int(state.flags["first_nonfinite"]) == -1 and int(state.flags["num_losses"]) == 296


def test_without_sigma_nothing_is_a_spike(monkeypatch):
    step, state = _step_of(monkeypatch, sigma=0.0)
    for x in [1.0] * 100 + [1000.0]:
        state, _ = step(state, np.float32(x))
    assert int(state.flags["skipped"]) == 0 == int(state.flags["num_losses"])


def test_a_checkpoint_without_the_later_flags_loads(tmp_path):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def state(flags):
        return TrainState(
            step=jnp.int32(5), index=jnp.int32(5), params={"w": jnp.arange(3.0)}, opt_state=(),
            rng=jnp.zeros((2,), jnp.uint32), flags=flags,
        )  # fmt: skip

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(5, state({"first_nonfinite": jnp.int32(-1)}), {})
    checkpoints.wait()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state(first_flags())
    )
    restored, _, step = checkpoints.newest_good(like)
    checkpoints.close()
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, restored, state(first_flags()))


def test_the_fields_are_checked_and_their_defaults_leave_the_sha(corpus):
    config = config_for(corpus)
    for override, told in (
        ("train.on_nonfinite=stop", "train.on_nonfinite: 'stop' is not one of"),
        ("train.spike_sigma=-1", "train.spike_sigma: -1.0 is not 0 or above"),
    ):
        with pytest.raises(ValueError, match=told):
            config_for(corpus, override)
    shas = {config_sha(config), config_sha(config_for(corpus, "train.spike_sigma=6"))}
    shas.add(config_sha(config_for(corpus, "train.on_nonfinite=skip")))
    assert len(shas) == 3
