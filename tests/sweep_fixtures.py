"""A config file with sweeps, and a stub for `train` that leaves what a run leaves.

  python tests/sweep_fixtures.py FACTS.json

FACTS is written by `stub_command`. What the stub does is told by the run's name: "ok" is the rest.
"""

import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time

CONFIG = """
from configs.gpt import get_config as gpt
from gpt_jax.scaling import grids

def get_config(argument=None):
    config = gpt("size=100k,debug")
    config.optimizer.name = "adamw"
    config.data.path = {corpus!r}
    config.train.tensorboard = False
    config.train.sample_prompts = ()
    config.train.eval_every = config.train.checkpoint_every = "25%"
    if argument == "short":
        config.train.duration = "4 steps"
    return config

def sweep_seeds():
    return grids.product(grids.values("seed", [0, 1]), [{{"group": "noise"}}])
"""


def write_config(folder: pathlib.Path, corpus: pathlib.Path | str, sweeps: str = "") -> str:
    """A config file with `sweeps` behind its own; its path."""
    path = folder / "sweeps.py"
    path.write_text(CONFIG.format(corpus=str(corpus)) + sweeps)
    return str(path)


def stub_command(run) -> list[str]:
    """For run_sweep: the stub instead of `train`."""
    facts = run.workdir.with_name(f"{run.name}.facts")
    text = {"workdir": str(run.workdir), "config": run.config.to_dict(), "steps": run.steps}
    facts.write_text(json.dumps(text))
    return [__file__, str(facts)]


def main(facts: dict) -> int:
    workdir, steps = pathlib.Path(facts["workdir"]), facts["steps"]
    with open(workdir.parent / "order.txt", "a") as file:
        file.write(f"{workdir.name} {sorted(os.sched_getaffinity(0))}\n")
    if workdir.name.startswith("bad"):
        print("error: what is wrong\n")
        return 2
    if workdir.name.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    workdir.mkdir(exist_ok=True)
    receipt = {
        "data": {"name": "texts", "train": {"rows": 40}},
        "num_parameters": 1000,
        "flops_per_token": 10.0,
        "steps": steps,
        "sessions": [{"started": "2026-01-01T00:00:00+00:00"}],
    }
    (workdir / "config.json").write_text(json.dumps(facts["config"]))
    (workdir / "receipt.json").write_text(json.dumps(receipt))
    loss = "nan" if workdir.name.startswith("wild") else 2.0
    rows = [{"step": 1, "train/loss": loss, "perf/tokens_per_sec": 100.0, "time": 1767225600.0}]
    if workdir.name.startswith("slow") and not (workdir / "checkpoints").exists():
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        (workdir / "ready").write_text("")
        if workdir.name == "slow-stops":
            os.kill(multiprocessing.parent_process().pid, signal.SIGTERM)
        while not stopped:
            time.sleep(0.01)
        save(workdir, rows, 1)
        print("SIGTERM: saved step 1")
        return 75
    if loss == "nan":
        save(workdir, rows, 0)
        return 1
    rows.append(
        {"step": steps, "eval/validation/loss": 1.5, "eval/tokens": 9, "time": 1767225609.0}
    )
    save(workdir, rows, steps)
    return 0


def save(workdir: pathlib.Path, rows: list[dict], step: int) -> None:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if step:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(pathlib.Path(sys.argv[1]).read_text())))
