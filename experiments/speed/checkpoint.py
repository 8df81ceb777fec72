"""What saving costs: how long the loop is held, and how fast the bytes get to the disk.

    python experiments/speed/checkpoint.py [--shapes=quickstart,gpt2] [--rounds=3] [--folder=DIR]

The state is AdamW's: parameters and two slots, 12 bytes a parameter. `Checkpoints.save` copies the
arrays, computes their digests and returns; the rest happens in the background. By turns:

- "held": until `save` returns, which is what the loop waits; "complete": until `wait` returns,
  nothing else running;
- "numpy": the same arrays by numpy.save, one file each, one after another, into a new folder;
- three steps, and three steps right after a save: what the writing takes from them.

Nobody asks the disk to have it all (fsync), so the numbers hold while the kernel has memory for it.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import arguments, machine, spread, write
from train_libraries import SHAPES, Ours, Shape

# The quickstart's size, and GPT-2's with few tokens: they do not count here.
NAMED = {
    "quickstart": Shape(L=4, D=192, N=6, T=256, B=8, V=2048),
    "gpt2": Shape(**vars(SHAPES["gpt2"]) | {"T": 128, "B": 1}),
}
STEPS = 3


def write_arrays(state: Any, folder: str) -> float:
    """Seconds in which numpy writes the arrays."""
    import jax
    import numpy as np

    with tempfile.TemporaryDirectory(dir=folder) as new:
        start = time.perf_counter()
        for number, leaf in enumerate(jax.tree.leaves(state)):
            np.save(Path(new) / f"{number}.npy", np.asarray(leaf))
        return time.perf_counter() - start


def steps_seconds(model: Ours) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        model.step("bfloat16")
    return time.perf_counter() - start


def measure(shape: Shape, folder: str, rounds: int) -> dict[str, Any]:
    """Seconds of one shape."""
    import jax

    from gpt_jax.runs.checkpoints import Checkpoints

    model = Ours(shape)
    steps_seconds(model)
    times: dict[str, list[float]] = {
        name: [] for name in ("held", "complete", "numpy", "steps", "steps after a save")
    }
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints", keep=1)
        for number in range(rounds + 1):
            start = time.perf_counter()
            checkpoints.save(2 * number, model.state, {})
            held = time.perf_counter() - start
            checkpoints.wait()
            complete = time.perf_counter() - start
            numpy = write_arrays(model.state, folder)
            before = steps_seconds(model)
            checkpoints.save(2 * number + 1, model.state, {})
            after = steps_seconds(model)
            checkpoints.wait()
            if number:  # the first one compiles
                for name, value in zip(times, (held, complete, numpy, before, after), strict=True):
                    times[name].append(value)
        checkpoints.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.state))
    return {"parameters": model.num_parameters, "bytes": size} | {
        name: spread(seconds) for name, seconds in times.items()
    }


def main() -> None:
    parser = arguments(__doc__, "checkpoint", rounds=3)
    parser.add_argument("--shapes", default=",".join(NAMED), help="of " + ",".join(NAMED))
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to be tried")
    args = parser.parse_args()
    names = args.shapes.split(",")
    if not set(names) <= set(NAMED):
        parser.error(f"--shapes are of {', '.join(NAMED)}")
    shapes = {name: NAMED[name] for name in names}
    if args.debug:
        shapes = {"debug": Shape(L=1, D=32, N=1, T=16, B=1, V=65)}

    from gpt_jax.parallel.startup import keep_memory

    keep_memory()
    result = {"machine": machine("jax", "jaxlib", "orbax-checkpoint", "numpy"), "rows": {}}
    print(
        "shape             MB   held s  complete s  numpy s  held/numpy  complete MB/s  numpy MB/s"
    )
    for name, shape in shapes.items():
        row = measure(shape, args.folder, args.rounds)
        held, complete, numpy = (row[k]["median"] for k in ("held", "complete", "numpy"))
        row["megabytes_per_second"] = row["bytes"] / complete / 1e6
        row["numpy_megabytes_per_second"] = row["bytes"] / numpy / 1e6
        row["held_to_numpy"] = held / numpy
        row["steps_slower"] = row["steps after a save"]["median"] / row["steps"]["median"]
        print(
            f"{name:10} {row['bytes'] / 1e6:9.1f} {held:8.3f} {complete:11.3f} {numpy:8.3f} "
            f"{held / numpy:11.2f} {row['megabytes_per_second']:14.0f} "
            f"{row['numpy_megabytes_per_second']:11.0f}"
        )
        print(
            f"{name:10} {STEPS} steps {row['steps']['median']:.3f} s, right after a save "
            f"{row['steps after a save']['median']:.3f} s: {row['steps_slower']:.2f} times",
            flush=True,
        )
        result["rows"][name] = row
    write(args.out, result)


if __name__ == "__main__":
    main()
