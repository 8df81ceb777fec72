"""Runs as a report reads them: a ladder whose losses follow a known law, without training."""

import json
import math
import random

from gpt_jax.runs import ledger

E, A, B, ALPHA, BETA = 1.2, 30.0, 60.0, 0.35, 0.35
EVIL = "<script>window.hit = 1</script>"


def law(num_params, num_tokens):
    return E + A / num_params**ALPHA + B / num_tokens**BETA


def ladder_rows(num_budgets=5, num_sizes=6, noise=0.002):
    """Rows of a ledger. One run has diverged, one is unfinished, one has markup for a name."""
    noisy = random.Random(0)
    rows = []
    for b in range(num_budgets):
        flops = 1e11 * 10 ** (b / 2)
        for i in range(num_sizes):
            num_params = int(math.sqrt(flops / 120) * 1.6 ** (i - num_sizes / 2 + 0.5))
            num_tokens = int(flops / 6 / num_params)
            loss = law(num_params, num_tokens) * (1 + noise * noisy.gauss(0, 1))
            name = f"c{flops:.0e}-n{num_params}-s0".replace("e+", "e")
            rows.append(_row(name, num_params, num_tokens, loss))
    if len(rows) > 8:
        rows[1]["name"] = EVIL
        rows[2] |= {"status": "diverged", "loss": math.nan}
        rows[3] |= {"status": "unfinished"}
    return rows


def _row(name, num_params, num_tokens, loss):
    curve = [[num_tokens * k / 8, loss + 2 * math.exp(-k)] for k in range(1, 9)]
    return {
        "name": name, "group": "", "status": "finished", "num_params": num_params,
        "num_params_non_embedding": int(0.8 * num_params), "num_tokens": num_tokens,
        "epochs": num_tokens / 1e7, "flops": 6.0 * num_params * num_tokens, "loss": loss,
        "bits_per_byte": loss / math.log(2), "best_loss": loss, "curve": curve, "seed": 0,
        "learning_rate": 0.01, "seconds": 10.0, "tokens_per_sec": num_tokens / 10,
        "config_sha": f"{num_params:064x}", "data": "python", "data_fingerprint": "ab" * 16,
        "git_commit": "cd" * 20, "versions": {"jax": "0.10.2"}, "prediction_sha256": None,
        "evaluations": {"python/test/parses": 0.25}, "overrides": {"model.embed_dim": num_params},
    }  # fmt: skip


def write_rows(path, rows):
    ledger.write_ledger(path, rows)
    return path


def write_run(folder, name, *, embed_dim=32, num_layers=2, steps=400):
    """A run directory without parameters: config, receipt and rows of a run that is finished."""
    from gpt_jax.runs.config import run_config

    workdir = folder / name
    (workdir / "checkpoints" / str(steps)).mkdir(parents=True)
    model = {
        "vocab_size": 257, "seq_len": 16, "num_layers": num_layers, "embed_dim": embed_dim,
        "num_heads": 2,
    }  # fmt: skip
    data = {"name": "shakespeare", "tokenizer": "bytes", "vocab_size": 257, "seq_len": 16}
    train = {"batch_size": 2, "duration": f"{steps} steps"}
    config = run_config({"seed": 0, "model": model, "data": data, "train": train})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    session = {
        "start_step": 0, "started": "2026-01-02T03:04:05+00:00", "command": ["gpt-jax", "train"],
        "git_commit": "cd" * 20, "git_diff": "", "python": "3.11.0", "packages": {"jax": "0.10.2"},
        "devices": ["cpu", "cpu"], "processes": 1, "mesh": {"data": 2},
    }  # fmt: skip
    receipt = {
        "id": "0a1b", "data": {"name": "shakespeare", "fingerprint": "ef" * 16},
        "num_parameters": 1000 * embed_dim, "flops_per_token": 6000.0 * embed_dim, "steps": steps,
        "tokens": 32 * steps, "sessions": [session],
    }  # fmt: skip
    (workdir / "receipt.json").write_text(json.dumps(receipt))
    rows = [
        {"step": k, "train/loss": 2 + 3 / k, "train/tokens": 32 * k} for k in range(1, steps + 1)
    ]
    rows[10]["train/loss"] = "nan"
    rows += [
        {"step": steps, "eval/validation/loss": 2.125, "eval/tokens": 32 * steps,
         "eval/validation/bits_per_byte": 3.0}
    ]  # fmt: skip
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def add_prediction(workdir, *, loss=2.1, sha=None, **more):
    """A prediction of a run's loss in its directory, and its sha256 in the receipt.

    Args:
      workdir: Of write_run.
      loss: Predicted, with an interval of 0.05 to both sides.
      sha: Written to the receipt instead; "": nothing is.
      **more: Other keys of the file.
    """
    from gpt_jax.scaling.prediction import write_prediction

    one = {"measure": "loss", "law": "param_data", "form": "L(N, D)", "constants": {}}
    one |= {"value": loss, "low": loss - 0.05, "high": loss + 0.05}
    other = {**one, "law": "compute", "form": "L(C)", "value": loss + 0.1, "low": loss + 0.08}
    other["high"] = loss + 0.12
    config = json.loads((workdir / "config.json").read_text())
    written = write_prediction(
        workdir,
        {"config": config, "predictions": [one, other], "made_after_the_run": False, **more},
    )
    receipt = json.loads((workdir / "receipt.json").read_text())
    if sha != "":
        receipt["prediction_sha256"] = sha or written
    (workdir / "receipt.json").write_text(json.dumps(receipt))
    return written
