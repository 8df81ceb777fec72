"""A run is run again: equal bit for bit, or what differs is named, and why."""

import json
import shutil

import jax
import pytest
from conftest import ROOT

from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train.loop import FINISHED, fit
from gpt_jax.train.reproduce import first_leaf, first_row, receipt_differences, reproduce
from gpt_jax.train.setup import set_up

OVERRIDES = (
    "model.embed_dim=8", "model.num_heads=2", "model.num_kv_heads=2", "model.mlp_dim=16",
    "model.num_layers=1", "model.seq_len=16", "data.seq_len=16", "data.tokenizer=bytes",
    "model.vocab_size=320", "train.duration=4", "train.batch_size=2", "train.num_microbatches=1",
    "train.log_every=1", "train.eval_every=2", "train.eval_batches=1", "model.dtype=float32",
    "train.checkpoint_every=2 steps", "train.sample_prompts=()", "train.tensorboard=false",
    "model.dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory, corpus, cache_dir):
    """A run of four steps on one device, with checkpoints at the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(corpus, folder / "corpus")
    words = (f"data.path={folder / 'corpus'}", *OVERRIDES)
    values, _ = load_config(str(ROOT / "configs" / "gpt.py:size=100k,debug"), words)
    training = set_up(run_config(values), folder / "run", cache_dir, jax.devices()[:1])
    assert fit(training) == FINISHED
    return folder / "run"


@pytest.fixture
def planted(original, tmp_path):
    """A copy of the run in which something is changed by `planted(file, change)`."""
    copy = tmp_path / "run"
    shutil.copytree(original, copy)

    def plant(file, change):
        values = json.loads((copy / file).read_text())
        change(values)
        (copy / file).write_text(json.dumps(values))
        return copy

    return plant


def test_the_same_machine_gives_the_same_bits(original, tmp_path, cache_dir):
    result = reproduce(original, tmp_path / "again", cache_dir, devices=jax.devices()[:1])
    assert result.equal and result.compared_steps == (2, 4) and result.steps == 4
    assert result.num_rows == 6 and result.differences == ()
    assert result.lines() == ["equal: bit for bit in 6 rows up to step 4; checkpoints: 2, 4"]
    kept = json.loads((original / "receipt.json").read_text())["sessions"][-1]["reproduced"]
    assert (kept["equal"], kept["steps"], kept["compared_steps"]) == (True, 4, [2, 4])


def test_another_seed_and_another_version_are_named_and_a_part_is_enough(
    planted, tmp_path, cache_dir
):
    planted("config.json", lambda values: values.update(seed=7))
    copy = planted(
        "receipt.json", lambda values: values["sessions"][0]["packages"].update(jax="0.0.1")
    )
    result = reproduce(copy, tmp_path / "again", cache_dir, 2, devices=jax.devices()[:1])
    assert not result.equal and result.steps == 2 and result.compared_steps == (2,)
    assert result.row.startswith("step 1, train/")
    assert result.leaf.startswith("step 2, params/")
    assert result.differences[0] == "config: seed was 0 at step 4, config.json has 7"
    assert result.differences[1] == f"packages.jax: 0.0.1 was {jax.__version__} again"
    assert any(line.startswith("may explain it: config: seed") for line in result.lines())


@pytest.mark.slow
def test_another_row_of_data_is_named(original, planted, tmp_path, cache_dir):
    shutil.copytree(original.parent / "corpus", tmp_path / "corpus")
    for file in (tmp_path / "corpus").iterdir():
        file.write_text(file.read_text().replace("the", "teh"))
    path = str(tmp_path / "corpus")
    copy = planted("config.json", lambda values: values["data"].update(path=path))
    result = reproduce(copy, tmp_path / "again", cache_dir, devices=jax.devices()[:1])
    assert not result.equal
    assert any(difference.startswith("data: ") for difference in result.differences)


@pytest.mark.slow
def test_another_mesh_is_named(original, tmp_path, cache_dir):
    result = reproduce(original, tmp_path / "again", cache_dir, devices=jax.devices()[:2])
    assert any(d.startswith("mesh: {'data': 1") for d in result.differences), result


def test_what_cannot_be_run_again_is_refused(original, tmp_path, cache_dir):
    with pytest.raises(ValueError, match=r"--steps: 5 is not in 1 to 4"):
        reproduce(original, tmp_path / "again", cache_dir, 5)
    with pytest.raises(ValueError, match=r"--workdir: .* is there already"):
        reproduce(original, tmp_path, cache_dir)
    with pytest.raises(ValueError, match=r"--run: .* holds no run"):
        reproduce(tmp_path, tmp_path / "again", cache_dir)


def test_where_things_first_differ():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 1.0}]
    assert first_row(rows, rows) == ""
    assert first_row(rows, [rows[0], {"step": 2, "a": 2.0}]) == "step 2, b: 1.0 was None again"
    assert first_row(rows, rows[:1]) == "there are 2 rows, and 1 again"
    one = {"leaves": {"opt_state/x": {"digest": "1"}, "params/x": {"digest": "1"}}}
    other = {"leaves": {"opt_state/x": {"digest": "2"}, "params/x": {"digest": "2"}}}
    assert first_leaf(3, one, one) == "" and first_leaf(3, one, other) == "step 3, params/x"


def test_every_start_of_a_run_counts():
    def receipt(*commits):
        sessions = [
            {"start_step": 10 * i, "git_commit": commit, "packages": {"jax": "1"}}
            for i, commit in enumerate(commits)
        ]
        return {"data": {"fingerprint": "f"}, "num_parameters": 1, "sessions": sessions}

    assert receipt_differences(receipt("a", "b"), receipt("b")) == ["git_commit: a was b again"]
    told = ["git_commit: b was a again (from step 10 on)"]
    assert receipt_differences(receipt("a", "b"), receipt("a")) == told
