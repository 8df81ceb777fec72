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
from pathlib import Path

from measuring import ROOT, alternating, arguments, machine, peak_memory, write


def one_run(keep: bool, steps: int) -> dict:
    """Trains some steps of the quickstart in this process."""
    from gpt_jax.cli.main import main
    from gpt_jax.parallel import startup

    if not keep:
        startup.keep_memory = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        words = ["train", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={workdir}"]
        words += [f"--config.train.{name}" for name in (
            f"duration={steps}", "eval_every=100%", "checkpoint_every=100%", "eval_batches=1",
            "sample_prompts=()", "tensorboard=false",
        )]  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            try:
                main(words)
            except SystemExit as end:  # of every command
                if end.code:
                    raise
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["perf/tokens_per_sec"] for row in rows if "perf/tokens_per_sec" in row]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "tokens/s": round(statistics.median(rates)),
        "page faults": usage.ru_minflt,
        "user s": round(usage.ru_utime, 1),
        "system s": round(usage.ru_stime, 1),
        "peak MiB": peak_memory() // 2**20,
    }


def main() -> None:
    parser = arguments(__doc__, "kept_memory", rounds=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--worker", choices=("kept", "freed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = 6 if args.debug else args.steps
    if args.worker:
        print(json.dumps(one_run(args.worker == "kept", steps)))
        return

    def run(kind: str) -> list[dict]:
        words = [sys.executable, __file__, f"--worker={kind}", f"--steps={steps}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        result = json.loads(done.stdout)
        print(f"{kind:6}", "  ".join(f"{name} {value:,}" for name, value in result.items()))
        return [result]

    runs = alternating(("freed", "kept"), run, args.rounds)
    rates = {kind: statistics.median(x["tokens/s"] for x in of) for kind, of in runs.items()}
    ratio = rates["kept"] / rates["freed"]
    print(f"kept / freed: {ratio:.2f} times the tokens a second")
    write(args.out, {"machine": machine("jax", "jaxlib"), "ratio": ratio, "runs": runs})


if __name__ == "__main__":
    main()
