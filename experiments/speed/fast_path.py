"""Does a run learn the same on the CPU's fast path as by the plain rules?

    python experiments/speed/fast_path.py [--seeds=3] [--steps=200]

The fast path is what a config gives on CPU: products with bf16 operands, written so that XLA's fast
routes take them, and attention by blocks with gradients of its own. The plain one is float32 and
attention of all scores at once, differentiated by JAX. Each seed (of the parameters and the order
of the data) is trained both ways on the standard library, 3 layers of 96.

Printed: the difference of the two ways at a step, mean over steps and largest, beside what seeds
differ by at a step (standard deviation of the plain way's losses, mean over steps); and the loss on
held-out rows at the end.
"""

import argparse
import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
from measuring import FOLDER, ROOT, machine, write

from gpt_jax.launch.study import gpt_jax

WAYS = {"fast": ("bfloat16", "auto"), "plain": ("float32", "einsum")}


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of a run: on its batches, one a step, and on all held-out rows."""

    train: np.ndarray
    held_out: float


def trained(way: str, seed: int, steps: int, folder: Path) -> Losses:
    """Trains one way."""
    from gpt_jax.runs.metrics import read_rows

    dtype, attention = WAYS[way]
    run = folder / f"{way}-{seed}"
    gpt_jax(
        "train", f"--config={ROOT / 'configs' / 'gpt.py'}:size=300k", f"--workdir={run}",
        f"--config.seed={seed}", f"--config.model.dtype={dtype}",
        f"--config.model.attention={attention}", f"--config.train.duration={steps}",
        "--config.train.batch_size=8", "--config.train.log_every=1",
        "--config.train.eval_every=100%", "--config.train.checkpoint_every=100%",
        "--config.train.sample_prompts=()", "--config.train.tensorboard=false",
    )  # fmt: skip
    rows = read_rows(run / "metrics.jsonl")
    train = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(train) == steps
    (held_out,) = [row["eval/validation/loss"] for row in rows if "eval/validation/loss" in row]
    return Losses(np.array(train), held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--debug", action="store_true", help="two seeds, four steps: does it run?")
    parser.add_argument("--out", default=str(FOLDER / "results" / "fast_path.json"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds: {args.seeds} is not at least 2, for a spread")
    seeds, steps = range(2 if args.debug else args.seeds), 4 if args.debug else args.steps
    with tempfile.TemporaryDirectory() as name:
        losses = {
            (way, seed): trained(way, seed, steps, Path(name))
            for seed, way in itertools.product(seeds, WAYS)
        }
    by_seed = np.array([losses["plain", seed].train for seed in seeds])
    spread = float(by_seed.std(0, ddof=1).mean())
    rows = []
    for seed in seeds:
        fast, plain = (losses[way, seed] for way in WAYS)
        difference = abs(fast.train - plain.train)
        rows.append({
            "seed": seed, "difference": float(difference.mean()),
            "largest": float(difference.max()), "held_out_fast": fast.held_out,
            "held_out_plain": plain.held_out,
        })  # fmt: skip
    held_out = float(np.std([row["held_out_plain"] for row in rows], ddof=1))
    print(f"{steps} steps; nats a token")
    print("seed  fast - plain: mean, largest at a step  held out: fast, plain")
    for row in rows:
        print(
            f"{row['seed']:4} {row['difference']:19.4f} {row['largest']:18.4f}"
            f" {row['held_out_fast']:16.4f} {row['held_out_plain']:.4f}"
        )
    print(f"seeds differ by {spread:.4f} at a step, by {held_out:.4f} held out")
    result = {"machine": machine("jax", "jaxlib"), "steps": steps, "rows": rows}
    write(args.out, result | {"seeds_differ": spread, "seeds_differ_held_out": held_out})


if __name__ == "__main__":
    main()
