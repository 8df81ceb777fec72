"""Best checkpoints and early stopping follow from the rows; frozen parameters are saved once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import trees
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.best import best_steps, metric_mode, should_stop
from gpt_jax.runs.checkpoints import Checkpoints, restore_params, save_params
from gpt_jax.runs.metrics import MetricsLog, read_rows
from gpt_jax.runs.state import TrainState

METRIC = "validation/loss"


def rows_of(values, name=METRIC):
    """One evaluation at the steps 10, 20, ..., rows of training between."""
    rows = []
    for i, value in enumerate(values):
        rows.append({"step": 10 * i + 9, "train/loss": 0.0})
        value = value if math.isfinite(value) else str(value)
        rows.append({"step": 10 * i + 10, f"eval/{name}": value})
    return rows


NAN = float("nan")


def test_the_best_are_finite_and_the_earliest_of_equals():
    rows = rows_of([3.0, NAN, 1.0, 2.0, 1.0, -math.inf, math.inf])
    assert best_steps(rows, METRIC, "min", 3) == [30, 50, 40]
    assert best_steps(rows, METRIC, "max", 3) == [10, 40, 30]
    assert best_steps(rows, METRIC, "min", 0) == []


def test_without_an_evaluation_there_is_no_best():
    assert best_steps(rows_of([1.0]), "task/f1", "max", 1) == []
    assert not should_stop([], METRIC, "min", 1)


@pytest.mark.parametrize(
    ("values", "stops_after"),
    [
        ([3, 2, 1, 1, 1, 0], 5),  # equal is no improvement
        ([3, 2, 4, 1, 4, 4], 6),
        ([3, NAN, NAN, 1], 3),
        ([NAN, NAN, 1], 2),
        ([3, 2, 1, 0], None),
    ],
)
def test_patience_counts_evaluations_without_improvement(values, stops_after):
    for mode, sign in (("min", 1), ("max", -1)):
        rows = rows_of([sign * value for value in values])
        stops = [n for n in range(1, 7) if should_stop(rows[: 2 * n], METRIC, mode, 2)]
        assert (stops[0] if stops else None) == stops_after
        assert not should_stop(rows, METRIC, mode, 0)


def test_the_name_says_which_way_is_better():
    assert metric_mode("validation/loss") == metric_mode("a/bits_per_byte") == "min"
    assert metric_mode("ner_en/f1") == "max" and metric_mode("ner_en/f1", "min") == "min"
    with pytest.raises(ValueError, match=r"train.metric_mode: '' does not say whether 'x/wer' is"):
        metric_mode("x/wer")
    with pytest.raises(ValueError, match=r"train.metric_mode: 'low' is not one of"):
        metric_mode("x/loss", "low")


def state(step=0, frozen=True):
    """A state of four leaves, one of them frozen."""
    params = {"tokens": None if frozen else jnp.zeros((2, 2)), "head": jnp.full((2,), float(step))}
    layers = {f"layers_{i}": {"w": jnp.full((3,), step + i)} for i in range(2)}
    params["stack"] = {"layers_0": {"w": None, "b": jnp.ones(())}, **layers} if frozen else layers
    return TrainState(
        step=jnp.int32(step),
        index=jnp.int32(step),
        params=params,
        opt_state={"mu": params},
        rng=jnp.zeros(2, jnp.uint32),
        flags={"first_nonfinite": jnp.int32(-1)},
    )


def like(tree):
    where = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


VALUES = [5.0, 1.0, NAN, 3.0, 1.0, 9.0, 2.0]


def go_on(folder, until, log=None):
    """A run that saves at each evaluation, from where it was to an evaluation; its saved steps."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    done = checkpoints.steps()[-1] if checkpoints.steps() else None
    log = MetricsLog(folder / "metrics.jsonl", done)
    kept = []
    for i in range((done or 0) // 10, until):
        step = 10 * i + 10
        log.write(step, {f"eval/{METRIC}": VALUES[i]})
        rows = read_rows(folder / "metrics.jsonl")
        checkpoints.save(step, state(step), {}, best=best_steps(rows, METRIC, "min", 2))
        checkpoints.wait()
        kept.append(checkpoints.steps())
    checkpoints.close()
    log.close()
    return kept


def test_the_newest_and_the_best_are_kept_however_often_it_is_killed(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = go_on(tmp_path / "whole", 7)
    assert whole == [
        [10], [10, 20], [10, 20, 30], [20, 30, 40], [20, 40, 50], [20, 50, 60], [20, 50, 60, 70]
    ]  # fmt: skip
    broken = go_on(tmp_path / "broken", 3)
    # An evaluation whose checkpoint did not come to be is cut off and done again.
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 40, "eval/{METRIC}": -1.0}}\n')
    broken += go_on(tmp_path / "broken", 5)
    broken += go_on(tmp_path / "broken", 7)
    assert broken == whole


def test_a_state_with_frozen_parameters_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    saved = state(3)
    checkpoints.save(3, saved, {"note": "x"})
    checkpoints.wait()
    restored, manifest = checkpoints.restore(3, like(saved))
    assert not any("tokens" in name for name in manifest["leaves"]) and manifest["note"] == "x"
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    params, _ = checkpoints.restore_params(3, like(saved.params))
    assert params["tokens"] is None
    # Another choice of what is frozen is not the same state.
    with pytest.raises(ValueError, match=r"checkpoint 3: not saved but wanted: \['params/tokens'"):
        checkpoints.restore_params(3, like(state(3, frozen=False).params))
    checkpoints.close()


def test_frozen_parameters_are_saved_once_and_anew_when_a_run_is_begun_anew(tmp_path):
    params = {"stack": {f"layers_{i}": {"w": jnp.arange(4.0) + i} for i in range(3)}}
    mask = trees.match(["layers_1"], params)
    frozen = trees.select(params, jax.tree.map(lambda trained: not trained, mask))
    save_params(tmp_path / "base", jax.tree.map(jnp.negative, frozen), {"from": "before"})
    save_params(tmp_path / "base", frozen, {"from": "now"})
    restored, metadata = restore_params(tmp_path / "base", like(frozen))
    assert metadata["from"] == "now"
    whole = trees.merge(trees.select(params, mask), restored)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    with pytest.raises(ValueError, match="nothing' holds no saved parameters"):
        restore_params(tmp_path / "nothing", like(frozen))
