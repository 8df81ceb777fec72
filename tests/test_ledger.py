"""The ledger: what a row says of runs that ended in every way, and the file itself."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.identity import _AS_EVER, config_sha, of_the_numbers
from gpt_jax.runs.ledger import ledger_row, read_ledger, run_steps, write_ledger
from gpt_jax.scaling import counts

SPEC = str(ROOT / "configs" / "gpt.py:size=100k,debug")
TOKENS = 256  # of a step of that config


def make_run(
    folder, *, rows=None, saved=(10, 20), steps=20, changes=(), evaluations="", receipt=()
):
    """A run directory as `train` leaves it, by default a finished one."""
    config = run_config(load_config(SPEC, ["optimizer.learning_rate=0.25", *changes])[0])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    facts = {
        "data": {"name": "texts", "fingerprint": "f00", "train": {"rows": 40}},
        "num_parameters": counts.num_parameters(config.model),
        "flops_per_token": 1000.0,
        "steps": steps,
        "sessions": [{"git_commit": "c0ffee", "packages": {"jax": "1.2.3"}}],
        **dict(receipt),
    }
    (folder / "receipt.json").write_text(json.dumps(facts))
    lines = [json.dumps(row) + "\n" for row in (usual_rows() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    if evaluations:
        (folder / "evaluations.jsonl").write_text(evaluations)
    return folder


def train_row(step, loss, **more):
    rate = {"perf/first_steps_seconds": 2.0} if step == 1 else {"perf/tokens_per_sec": 512.0}
    return {"step": step, "train/loss": loss, "train/grad_norm": 1.0, **rate, **more}


def eval_row(step, loss):
    values = {"eval/validation/loss": loss, "eval/validation/bits_per_byte": 0.5}
    return {"step": step, **values, "eval/tokens": step * TOKENS}


def usual_rows():
    rows = [train_row(1, 6.0), train_row(10, 5.0), eval_row(10, 4.5), train_row(20, 4.0)]
    return [*rows, eval_row(20, 4.6)]


def test_a_finished_run(tmp_path):
    folder = make_run(tmp_path / "run", receipt={"prediction_sha256": "abc"}.items())
    overrides = {"seed": 0}
    row = ledger_row(folder, group="g", overrides=overrides)
    config = run_config(json.loads((folder / "config.json").read_text()))
    assert row == {
        "name": "run", "group": "g", "status": "finished",
        "num_params": 57568, "num_params_non_embedding": 57568 - 512 * 32,
        "num_tokens": 20 * TOKENS, "epochs": 20 * 8 / 40, "flops": 1000.0 * 20 * TOKENS,
        "loss": 4.6, "bits_per_byte": 0.5,
        "best_loss": 4.6,  # only the last evaluation is of the whole split
        "curve": [[10 * TOKENS, 4.5], [20 * TOKENS, 4.6]],
        "seed": 0, "learning_rate": 0.25,
        "seconds": 2.0 + 19 * TOKENS / 512, "tokens_per_sec": 512.0,
        "config_sha": config_sha(config), "data": "texts", "data_fingerprint": "f00",
        "git_commit": "c0ffee", "versions": {"jax": "1.2.3"}, "prediction_sha256": "abc",
        "evaluations": {}, "overrides": overrides,
    }  # fmt: skip
    assert ledger_row(folder, failed=True)["status"] == "finished"


def test_rows_behind_the_checkpoint_do_not_count(tmp_path):
    folder = make_run(tmp_path / "run", saved=(10,))  # killed after the last evaluation
    row = ledger_row(folder)
    assert (row["status"], row["num_tokens"], row["loss"]) == ("unfinished", 10 * TOKENS, 4.5)
    assert row["curve"] == [[10 * TOKENS, 4.5]] and row["flops"] == 1000.0 * 10 * TOKENS
    assert ledger_row(folder, failed=True)["status"] == "failed"
    assert run_steps(folder) == (20, 20)  # how far it is now, for people
    early = ledger_row(make_run(tmp_path / "early", saved=()))
    assert (early["status"], early["num_tokens"], early["loss"]) == ("unfinished", 0, None)
    # A checkpoint that was not written whole has another name.
    (folder / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
    assert ledger_row(folder)["status"] == "unfinished"


@pytest.mark.parametrize("field", ["train/loss", "train/grad_norm"])
def test_a_diverged_run(tmp_path, field):
    rows = [*usual_rows()[:3], train_row(12, 5.0, **{field: "nan"})]
    row = ledger_row(make_run(tmp_path / "run", rows=rows, saved=(10,)), failed=True)
    assert (row["status"], row["num_tokens"], row["loss"]) == ("diverged", 12 * TOKENS, 4.5)


def test_what_is_not_finite_survives_the_file(tmp_path):
    rows = [*usual_rows()[:4], eval_row(20, "inf")]
    folder = make_run(tmp_path / "nan", rows=rows)
    row = ledger_row(folder)
    assert row["status"] == "finished" and math.isinf(row["loss"]) and row["best_loss"] is None
    write_ledger(tmp_path / "ledger.jsonl", [row])
    assert "Infinity" not in (tmp_path / "ledger.jsonl").read_text()
    assert read_ledger(tmp_path / "ledger.jsonl") == [row]
    assert row["name"] == "nan"  # a name is a text, whatever it looks like


def test_lines_that_were_cut_off(tmp_path):
    score = json.dumps({"step": 20, "task": "lines", "split": "test", "num_shots": 0, "hits": 0.5})
    shots = json.dumps({"step": 20, "task": "lines", "split": "test", "num_shots": 2, "hits": 0.75})
    newer = score.replace("0.5", "0.25")
    text = f'{score}\n{{"step": 2{shots}\n{shots}\n{newer}\n{score[:40]}'
    folder = make_run(tmp_path / "run", evaluations=text)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "eval/valida')
    row = ledger_row(folder)
    assert row["evaluations"] == {"lines/test/hits": 0.25, "lines/test/2_shot/hits": 0.75}
    assert row["loss"] == 4.6


def test_a_run_that_was_stopped_early_is_finished(tmp_path):
    losses = {5: 4.0, 10: 3.0, 15: 3.5, 20: 3.25}
    rows = [eval_row(step, loss) for step, loss in losses.items()]
    patient = ["train.patience=2", "train.keep_best=1"]
    row = ledger_row(
        make_run(tmp_path / "run", rows=rows, saved=(10, 20), steps=40, changes=patient)
    )
    assert (row["status"], row["loss"], row["best_loss"]) == ("finished", 3.25, 3.0)
    more = ["train.patience=3", "train.keep_best=1"]
    row = ledger_row(make_run(tmp_path / "more", rows=rows, saved=(10, 20), steps=40, changes=more))
    assert row["status"] == "unfinished"


@pytest.mark.parametrize(
    "spec", ["gpt.py", "gpt2.py:size=124m", "pretrain_t5.py", "pretrain_bert.py", "article.py"]
)
def test_embeddings_are_counted_as_by_scaling_counts(tmp_path, spec):
    config = run_config(load_config(str(ROOT / "configs" / spec))[0])
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    groups = counts.parameter_counts(config.model)
    facts = json.loads((folder / "receipt.json").read_text())
    facts["num_parameters"] = sum(groups.values())
    (folder / "receipt.json").write_text(json.dumps(facts))
    without = sum(groups.values()) - groups["token embedding"] - groups["position embedding"]
    assert ledger_row(folder)["num_params_non_embedding"] == without


def test_the_file_is_sorted_and_replaced(tmp_path):
    path = tmp_path / "folder" / "ledger.jsonl"
    write_ledger(path, [{"name": "b", "loss": 2.0}, {"name": "a", "loss": math.nan}])
    assert path.read_text() == '{"name": "a", "loss": "nan"}\n{"name": "b", "loss": 2.0}\n'
    with open(path) as reading:  # who has it open reads all of what it was
        write_ledger(path, [{"name": "a", "loss": 1.0}])
        assert len(reading.readlines()) == 2
    before = path.read_text()
    with pytest.raises(TypeError):
        write_ledger(path, [{"name": "c", "loss": object()}])
    assert path.read_text() == before  # nothing is half written


def test_a_bad_ledger_or_run_is_named(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"name": "a"}\n{"name": "b", "lo')
    with pytest.raises(ValueError, match=r"^--ledger: line 2 of '.*ledger.jsonl' is not a row"):
        read_ledger(path)
    path.write_text('{"name": "a"}\n{"name": "a"}\n')
    with pytest.raises(ValueError, match=r"^--ledger: .* has two rows named 'a'"):
        read_ledger(path)
    with pytest.raises(ValueError, match=r"^--run: .* holds no run \(no config.json\)"):
        ledger_row(tmp_path)
    (make_run(tmp_path / "run") / "receipt.json").write_text("{")
    with pytest.raises(ValueError, match=r"^--run: .*receipt.json' is damaged"):
        ledger_row(tmp_path / "run")


def test_a_config_has_one_sha(tmp_path):
    values = load_config(SPEC)[0]
    config = run_config(values)
    kept = json.loads(json.dumps(config.to_dict()))  # as config.json gives it
    assert config_sha(config) == config_sha(run_config(kept))
    # Fields that came later are not in it while they change nothing.
    values = {name: x for name, x in of_the_numbers(config).items() if name not in _AS_EVER}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert config_sha(config) == hashlib.sha256(text.encode()).hexdigest()
    kept["train"]["log_every"] = 3  # only watches
    assert config_sha(config) == config_sha(run_config(kept))
    for section, field, value in (("", "seed", 1), ("model", "num_experts", 4)):
        changed = json.loads(json.dumps(kept))
        (changed[section] if section else changed)[field] = value
        assert config_sha(config) != config_sha(run_config(changed)), field


def test_a_ledger_starts_no_jax():
    code = "import gpt_jax.runs.ledger, gpt_jax.launch.local, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
