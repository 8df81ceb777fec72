"""How long it takes to begin: help, a config, the quickstart's first step, imports.

    python experiments/speed/start.py [--rounds=3]

- `python -m gpt_jax --help` and `config --config=configs/quickstart.py`, by turns with a Python
  that does nothing and one that only imports JAX;
- `train --config=configs/quickstart.py` until it prints its first step, with an empty cache folder
  ("cold": text, tokenizer and tokens are made, all is compiled), with the compiled programs taken
  out of it ("compile"), and with all of it ("cached"). Each has a new run directory and is killed
  at its first step; "set up" is when it says what it is about to run;
- import time (-X importtime) by package: what each package's own modules took, of all that `train`
  had imported by its first step; the ten largest.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, alternating, arguments, machine, spread, write

PYTHON = [sys.executable, "-m", "gpt_jax"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import jax'": [sys.executable, "-c", "import jax"],
    "gpt-jax --help": [*PYTHON, "--help"],
    "gpt-jax config": [*PYTHON, "config", "--config=configs/quickstart.py"],
}
FIRST_STEP = re.compile(r"step +1/")


def environment(cache: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "GPT_JAX_CACHE": cache}


def command_seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def train_words(config: str, run: str) -> list[str]:
    return ["train", f"--config={config}", f"--workdir={run}", "--config.train.tensorboard=false"]


def first_step(config: str, cache: str) -> dict[str, float]:
    """Seconds from the command to what it is about to run, and to its first step."""
    seconds = {}
    with tempfile.TemporaryDirectory() as run:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*PYTHON, *train_words(config, run)], cwd=ROOT, env=environment(cache),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("model:"):
                seconds["set_up"] = time.perf_counter() - start
            if FIRST_STEP.match(line):
                seconds["first_step"] = time.perf_counter() - start
                break
        process.kill()
        _, message = process.communicate()
    if "first_step" not in seconds:
        raise SystemExit(f"error: no first step:\n{message}")
    return seconds


def starts(config: str, rounds: int) -> dict[str, list[dict]]:
    """The three kinds of start, by turns."""
    found = {"cold": [], "compile": [], "cached": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            found["cold"].append(first_step(config, cache))
            # A program that was being written when the process was killed is completed here.
            first_step(config, cache)
            found["cached"].append(first_step(config, cache))
            shutil.rmtree(Path(cache) / "xla")
            found["compile"].append(first_step(config, cache))
    return found


def by_package(log: str) -> dict[str, float]:
    """Seconds of the packages' own modules, from what -X importtime writes."""
    seconds: dict[str, float] = collections.Counter()
    for line in log.splitlines():
        match = re.match(r"import time: +(\d+) \| +\d+ \| +([\w.]+)", line)
        if match:
            seconds[match[2].split(".")[0]] += int(match[1]) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def imports(config: str) -> dict[str, float]:
    """Import seconds by package of a whole short run."""
    with tempfile.TemporaryDirectory() as folder:
        words = train_words(config, f"{folder}/run")
        words += [f"--config.train.{name}" for name in ("duration=2 steps", "sample_prompts=()")]
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *PYTHON[1:], *words], cwd=ROOT,
            env=environment(f"{folder}/cache"), capture_output=True, text=True, check=True,
        )  # fmt: skip
    return by_package(done.stderr)


def main() -> None:
    parser = arguments(__doc__, "start", rounds=3)
    args = parser.parse_args()
    result = {"machine": machine("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")}

    times = alternating(COMMANDS, lambda name: [command_seconds(COMMANDS[name])], args.rounds)
    result["commands"] = {name: spread(seconds) for name, seconds in times.items()}
    print("command                  seconds   least    most")
    for name, s in result["commands"].items():
        print(f"{name:24} {s['median']:7.2f} {s['min']:7.2f} {s['max']:7.2f}", flush=True)

    config = "configs/quickstart.py" + (":debug" if args.debug else "")
    result["starts"] = {
        kind: {name: spread([run[name] for run in runs]) for name in ("set_up", "first_step")}
        for kind, runs in starts(config, args.rounds).items()
    }
    print("quickstart    set up  first step   least    most")
    for kind, found in result["starts"].items():
        s = found["first_step"]
        print(
            f"{kind:11} {found['set_up']['median']:8.1f} {s['median']:11.1f} "
            f"{s['min']:7.1f} {s['max']:7.1f}",
            flush=True,
        )

    seconds = imports("configs/quickstart.py:debug")
    result["imports"] = {"all": sum(seconds.values()), **dict(list(seconds.items())[:10])}
    print("imports, seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in result["imports"].items()))
    write(args.out, result)


if __name__ == "__main__":
    main()
