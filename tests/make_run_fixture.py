"""Writes tests/data/run_NAME/: a run of today's format, which every later version must read.

    python tests/make_run_fixture.py NAME

A tiny run of four steps with one checkpoint, layers unrolled, and beside it the text that it read.
Made once for each format; those that lie there stay as they are.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import conftest
import jax
import numpy as np

from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.train.loop import FINISHED, fit
from gpt_jax.train.setup import set_up

DATA = Path(__file__).parent / "data"
OVERRIDES = (
    "model.embed_dim=8", "model.num_heads=2", "model.num_kv_heads=2", "model.mlp_dim=16",
    "model.num_layers=2", "model.seq_len=16", "data.seq_len=16", "data.tokenizer=bytes",
    "model.vocab_size=320", "train.duration=4", "train.batch_size=2", "train.num_microbatches=1",
    "train.log_every=1", "train.eval_every=2", "train.eval_batches=1",
    "train.checkpoint_every=2 steps", "train.keep=1", "train.sample_prompts=()",
    "train.tensorboard=false",
)  # fmt: skip


def main(name: str) -> None:
    workdir = DATA / f"run_{name}"
    if workdir.exists():
        sys.exit(f"{workdir} is there already")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that its paths, which its checkpoints hold, are nobody's
        text = Path("corpus")
        text.mkdir()
        words = ["the", "cat", "dog", "sat", "ran", "on", "mat", "tree"]
        rng = np.random.default_rng(0)
        for i in range(8):
            (text / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)) + ".\n")
        config_file = str(conftest.ROOT / "configs" / "gpt.py:size=100k,debug")
        values, _ = load_config(config_file, (f"data.path={text}", *OVERRIDES))
        here = Path(folder) / "run"
        training = set_up(run_config(values), here, Path(folder) / "cache", jax.devices()[:1])
        assert fit(training) == FINISHED
        # Nothing of the machine that it was made on.
        for extra in ("loss.png", ".lock"):
            (here / extra).unlink(missing_ok=True)
        receipt = json.loads((here / "receipt.json").read_text())
        for session in receipt["sessions"]:
            session |= {"command": ["gpt-jax", "train"], "git_diff": ""}
        (here / "receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
        shutil.copytree(text, here / "corpus")
        for path in here.rglob("*"):
            if path.is_file() and folder.encode() in path.read_bytes():
                path.write_text(path.read_text().replace(folder, ""))
        shutil.copytree(here, workdir)


if __name__ == "__main__":
    main(sys.argv[1])
