"""The two studies of experiments/, each from its one command, in seconds."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt_jax.runs.ledger import read_ledger
from gpt_jax.scaling.prediction import score

# Runs of one size then compile nothing anew, however long they are; and little at all.
QUICK = (
    "--config.optimizer.schedule=constant", "--config.optimizer.warmup=0",
    "--config.optimizer.name=adamw",
)  # fmt: skip


@pytest.fixture
def run_study(cache_dir, corpus, tmp_path):
    """Runs experiments/<name>/study.py --debug; its folder and what it said."""

    def run(name: str, *words: str):
        environment = {**os.environ, "GPT_JAX_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [
                sys.executable, f"experiments/{name}/study.py", "--debug", "--processes=2",
                f"--root={tmp_path}", f"--config.data.path={corpus}", *QUICK, *words,
            ],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return tmp_path, done.stdout

    return run


def test_predictable_scaling(run_study):
    once = [f"--config.train.{what}=100%" for what in ("eval_every", "checkpoint_every")]
    folder, said = run_study("predictable_scaling", "--config.train.batch_size=2", *once)
    rows = read_ledger(folder / "debug.jsonl")
    assert len(rows) == 6 and {row["status"] for row in rows} == {"finished"}
    result = score(folder / "held_out")
    assert not result.objections  # made before the run, of that run
    assert result.comparisons[0].actual > 0 and f"sha256 {result.sha256}" in said
    receipt = json.loads((folder / "held_out" / "receipt.json").read_text())
    assert receipt["prediction_sha256"] == result.sha256
    assert (folder / "report.html").exists() and (folder / "figures" / "predictions.png").exists()


def test_pretraining_vs_finetuning(run_study):
    folder, said = run_study("pretraining_vs_finetuning")
    rows = {row["name"]: row for row in read_ledger(folder / "debug.jsonl")}
    assert len(rows) == 5 and {row["status"] for row in rows.values()} == {"finished"}
    found = json.loads((folder / "figures" / "results.json").read_text())
    few = found["cells"][0]
    assert few["finetune_tokens"] == 5_000
    assert few["loss"] == rows["finetuned-25k-5k-s0"]["best_loss"]
    # Text of one kind: what began from it is ahead.
    assert few["loss"] < rows["scratch-25k-5k-s0"]["best_loss"]
    assert "too few runs for D_T" in said and (folder / "figures" / "multiplier.png").exists()
