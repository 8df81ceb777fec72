"""What the scripts of this folder share: workers, alternating runs, the machine, JSON."""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PEERS = ("torch", "transformers")


class Worker:
    """A process that answers jobs: each library has one of its own, so their threads do not meet.

    Args:
      script: A file of this folder that calls `answer_jobs`.
      arguments: For it.
    """

    def __init__(self, script: str, *arguments: str):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        command = [sys.executable, str(FOLDER / script), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, **job: Any) -> Any:
        """The worker's answer to a job of JSON values."""
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("error: a worker ended; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def answer_jobs(answer: Callable[[dict], Any]) -> None:
    """A worker's side: lines of JSON in, lines of JSON out."""
    for line in sys.stdin:
        # What else a library writes must not be taken for an answer.
        with contextlib.redirect_stdout(sys.stderr):
            result = answer(json.loads(line))
        print(json.dumps(result), flush=True)


def alternating(
    cases: Iterable[Hashable], run: Callable[[Any], Iterable[Any]], rounds: int
) -> dict[Any, list[Any]]:
    """Figures of each case. All cases are run by turns, so that other load meets them alike."""
    figures: dict[Any, list[Any]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, values in figures.items():
            values += run(case)
    return figures


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def roof(dtype: str) -> float:
    """FLOP/s of a square product in JAX that emits float32: the fastest of some seconds' tries."""
    from gpt_jax.parallel.peaks import measured

    return max(measured.__wrapped__(dtype)[0] for _ in range(3))


def peak_memory() -> int:
    """Bytes that this process has held at most, as the kernel counts them (Linux)."""
    # ru_maxrss would remember the program that this one was started by.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def machine(*packages: str) -> dict[str, Any]:
    """What a result depends on beside the code; other work shows as load."""
    from gpt_jax.parallel.peaks import processor

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def arguments(doc: str, name: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every script takes.

    Args:
      doc: The script's docstring.
      name: Of its JSON file.
      rounds: The default of --rounds.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=_positive, default=rounds, help="turns of each case")
    parser.add_argument("--debug", action="store_true", help="the smallest sizes: does it run?")
    parser.add_argument("--out", default=str(FOLDER / "results" / f"{name}.json"))
    return parser


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is below 1")
    return int(word)


def require(*packages: str) -> None:
    """Ends the program with a hint where a package is missing."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        hint = "missing; pip install -e '.[peers]'"
        print(f"error: {', '.join(missing)}: {hint}", file=sys.stderr)
        raise SystemExit(2)


def write(path: str, result: dict[str, Any]) -> None:
    """Writes a script's JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
