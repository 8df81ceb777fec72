"""What keeping freed memory is worth: the quickstart's step with and without it, alternating.

    python experiments/speed/kept_memory.py [--rounds=2] [--steps=60]

Each run is a process of its own: page faults, processor seconds, peak memory, and the median of the
tokens a second that the run itself measured.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile


def one_run(keep: bool, steps: int) -> dict:
    """Trains some steps of the quickstart in this process."""
    from gpt_jax.cli.main import main
    from gpt_jax.parallel import startup

    if not keep:
        startup.keep_memory = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        workdir = os.path.join(folder, "run")
        words = ["train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
        words += [f"--config.train.{name}" for name in (
            f"duration={steps}", "eval_every=100%", "checkpoint_every=100%", "eval_batches=1",
            "sample_prompts=()", "tensorboard=false",
        )]  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            main(words)
        with open(os.path.join(workdir, "metrics.jsonl")) as file:
            rows = [json.loads(line) for line in file]
    rates = [row["perf/tokens_per_sec"] for row in rows if "perf/tokens_per_sec" in row]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "tokens/s": round(statistics.median(rates)),
        "page faults": usage.ru_minflt,
        "user s": round(usage.ru_utime, 1),
        "system s": round(usage.ru_stime, 1),
        "peak MiB": usage.ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--worker", choices=("kept", "freed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(one_run(arguments.worker == "kept", arguments.steps)))
        return
    rates = {"freed": [], "kept": []}
    for _ in range(arguments.rounds):
        for kind, measured in rates.items():
            words = [sys.executable, __file__, f"--worker={kind}", f"--steps={arguments.steps}"]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout)
            measured.append(result["tokens/s"])
            print(f"{kind:6}", "  ".join(f"{name} {value:,}" for name, value in result.items()))
    ratio = statistics.median(rates["kept"]) / statistics.median(rates["freed"])
    print(f"kept / freed: {ratio:.2f} times the tokens a second")


if __name__ == "__main__":
    main()
