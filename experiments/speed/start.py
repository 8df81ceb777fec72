"""How long it takes to begin: help, a config, the quickstart's first step, imports.

    python experiments/speed/start.py [--rounds=3]

- `python -m gpt_jax --help` and `config --config=configs/quickstart.py`, by turns with a Python
  that does nothing and one that only imports JAX;
- `train --config=configs/quickstart.py` until it prints its first step, with an empty cache folder
  ("cold": text, tokenizer and tokens are made, all is compiled), with the compiled programs taken
  out of it ("compile"), and with all of it ("cached"). Each has a new run directory and is killed
  at its first step; "set up" is when it says what it is about to run;
- import time (-X importtime) by package: what each package's own modules took, of all that a cached
  `train` has imported when it prints its first step; the ten largest.

"Processor" are the seconds of all its threads: on a busy machine they change less than the wall's.
"""

import collections
import os
import re
import resource
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


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command_seconds(words: list[str]) -> dict[str, float]:
    start, processor = time.perf_counter(), processor_seconds()
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return {"wall": time.perf_counter() - start, "processor": processor_seconds() - processor}


def train_words(config: str, run: str) -> list[str]:
    return ["train", f"--config={config}", f"--workdir={run}"]


def first_step(config: str, cache: str) -> dict[str, float]:
    """Seconds from the command to what it is about to run, and to its first step."""
    seconds, processor = {}, processor_seconds()
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
    return seconds | {"processor": processor_seconds() - processor}


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
    """Import seconds by package until the first step is printed."""
    with tempfile.TemporaryDirectory() as folder:
        for run in ("cold", "cached"):
            words = train_words(config, f"{folder}/{run}")
            words += ["--config.train.duration=2 steps", "--config.train.sample_prompts=()"]
            done = subprocess.run(
                [sys.executable, "-X", "importtime", *PYTHON[1:], *words], cwd=ROOT, text=True,
                env=environment(f"{folder}/cache"), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip
    return by_package(FIRST_STEP.split(done.stdout)[0])


def main() -> None:
    parser = arguments(__doc__, "start", rounds=3)
    args = parser.parse_args()
    result = {"machine": machine("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")}

    times = alternating(COMMANDS, lambda name: [command_seconds(COMMANDS[name])], args.rounds)
    result["commands"] = {
        name: {clock: spread([run[clock] for run in runs]) for clock in ("wall", "processor")}
        for name, runs in times.items()
    }
    print("command                  seconds   least    most  processor")
    for name, found in result["commands"].items():
        s = found["wall"]
        print(
            f"{name:24} {s['median']:7.2f} {s['min']:7.2f} {s['max']:7.2f} "
            f"{found['processor']['median']:10.2f}",
            flush=True,
        )

    config = "configs/quickstart.py" + (":debug" if args.debug else "")
    result["starts"] = {
        kind: {
            name: spread([run[name] for run in runs])
            for name in ("set_up", "first_step", "processor")
        }
        for kind, runs in starts(config, args.rounds).items()
    }
    print("quickstart    set up  first step   least    most  processor")
    for kind, found in result["starts"].items():
        s = found["first_step"]
        print(
            f"{kind:11} {found['set_up']['median']:8.1f} {s['median']:11.1f} "
            f"{s['min']:7.1f} {s['max']:7.1f} {found['processor']['median']:10.1f}",
            flush=True,
        )

    seconds = imports("configs/quickstart.py:debug")
    result["imports"] = {"all": sum(seconds.values()), **dict(list(seconds.items())[:10])}
    print("imports, seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in result["imports"].items()))
    write(args.out, result)


if __name__ == "__main__":
    main()
