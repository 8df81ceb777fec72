"""Real processes on loopback that train a tiny model together, and a store without processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from conftest import ROOT

from gpt_jax.runs.config import run_config
from gpt_jax.runs.config_file import load_config
from gpt_jax.runs.events import file_of, read_events
from gpt_jax.runs.metrics import VOLATILE, read_rows

OVERRIDES = (
    "model.embed_dim=8", "model.num_heads=2", "model.num_kv_heads=2", "model.mlp_dim=16",
    "model.num_layers=1", "model.seq_len=16", "data.seq_len=16", "data.tokenizer=bytes",
    "model.vocab_size=320", "train.duration=12", "train.batch_size=4", "train.num_microbatches=1",
    "train.log_every=1", "train.eval_every=6", "train.eval_batches=1", "train.sample_prompts=()",
    "train.checkpoint_every=4 steps", "train.tensorboard=false",
)  # fmt: skip
# What every process of a test does before the program begins: whatever the test plants, which
# finds its own number in PROCESS.
_ENTRY = """
import os, sys
PROCESS = int(os.environ["PROCESS"])
exec(os.environ.get("PLANTED", ""))
from gpt_jax.cli.main import main
main(sys.argv[1:])
"""


def config_for(corpus, *overrides):
    """The same config for a run in this process."""
    values, _ = load_config(
        str(ROOT / "configs" / "gpt.py:size=100k,debug"),
        (f"data.path={corpus}", *OVERRIDES, *overrides),
    )
    return run_config(values)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """The processes of one start; their outputs are in files beside the run.

    They find each other by options, or with `slurm` as the tasks of a job.
    """

    def __init__(self, number, workdir, corpus, cache_dir, *overrides, devices=1, planted="",
                 options=(), slurm=False):  # fmt: skip
        self.workdir, self._logs = workdir, []
        words = ["train", "--config=configs/gpt.py:size=100k,debug", f"--workdir={workdir}"]
        words += [f"--config.data.path={corpus}", *options]
        words += [f"--config.{override}" for override in (*OVERRIDES, *overrides)]
        self.words = words
        self.env = env = {
            **os.environ, "GPT_JAX_CACHE": str(cache_dir), "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices), "PLANTED": planted, "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # cheap programs, as in conftest.py
        }  # fmt: skip
        self.processes = []
        port = free_port()
        together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}"]
        together += ["--heartbeat_timeout=10"]
        for i in range(number):
            which = [*together, f"--process_id={i}"] if number > 1 else []
            env = {**env, "PROCESS": str(i)}
            if slurm:
                which = ["--distributed=auto", "--heartbeat_timeout=10"]
                env |= {**slurm_task(i, number), "JAX_COORDINATOR_PORT": str(port)}
                env["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
            self._logs.append(workdir.parent / f"{workdir.name}-{i}-{time.monotonic_ns()}.log")
            with open(self._logs[-1], "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _ENTRY, *words, *which], cwd=ROOT, env=env,
                        stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def codes(self, timeout=300) -> list[int]:
        """The exit codes; kills what has not ended."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        return [process.wait() for process in self.processes]

    def output(self, process: int) -> str:
        return self._logs[process].read_text(errors="replace")

    def outputs(self) -> str:
        return "\n".join(self.output(i) for i in range(len(self._logs)))

    def signal_at(self, step: int, number: signal.Signals, process: int) -> None:
        """Sends the signal once the run has written the row of a step in this start."""
        wait_for_row(self.workdir, step, self.processes)
        self.processes[process].send_signal(number)


def slurm_task(i: int, number: int) -> dict[str, str]:
    """What srun tells a task of a job on this machine."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(number),
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip


def wait_for_row(workdir, step, processes, timeout=200) -> None:
    """Returns when a process that lives has written the row of a step; or all have ended."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + timeout
    left = path.stat().st_ino if path.exists() else None
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino != left and any(r["step"] >= step for r in read_rows(path)):
                return
        time.sleep(0.005)


def settled(workdir):
    """The rows without what differs between equal runs."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows]


def steps_begun_at(workdir, process=0):
    return [
        e["start_step"] for e in read_events(workdir / file_of(process)) if e["kind"] == "begin"
    ]


class FakeStore:
    """What the coordination service does with keys, in one process: for peers in threads."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            if key in self._values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: Config key {key} already exists.")
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
            return self._values[key]

    def key_value_dir_get(self, key):
        with self._changed:
            return [item for item in self._values.items() if item[0].startswith(key)]

    def key_value_delete(self, key):
        with self._changed:
            self._values = {k: v for k, v in self._values.items() if not k.startswith(key)}


def receipt(workdir):
    return json.loads((workdir / "receipt.json").read_text())
