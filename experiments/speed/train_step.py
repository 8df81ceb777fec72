"""A training step of gpt_jax against Hugging Face's GPT2LMHeadModel on this machine's CPU.

    pip install -e '.[peers]'
    python experiments/speed/train_step.py [--shapes=small,char,gpt2] [--steps=10] [--eager]

Both train the GPT-2 architecture (train_libraries.py). Each library lives in a process of its own;
rounds of steps alternate between f32 and bf16 of both, the peer's also through torch.compile (not
with --eager). Times are medians over all timed steps, after three of warm-up. A round takes at
least a quarter of a second, or small steps would be timed while the caches are another process's.

Share of the roof: FLOPs of a step over its time, over the speed of a square product in the same
dtype. FLOPs are gpt_jax.scaling.counts', causal attention counted half.
"""

import dataclasses
import statistics

from measuring import PEERS, Worker, alternating, arguments, machine, require, write
from train_libraries import SHAPES, Shape

DTYPES = ("float32", "bfloat16")
LEAST_SECONDS = 0.25  # of a round


def cases(eager: bool) -> list[tuple[str, str, bool]]:
    """(library, dtype, compiled) of all that alternate."""
    found = [(who, dtype, False) for dtype in DTYPES for who in ("ours", "peer")]
    return found if eager else found + [("peer", dtype, True) for dtype in DTYPES]


def measure(workers: dict, name: str, shape: Shape, args, roof: dict[str, float]) -> list[dict]:
    """Rows of one shape, by library, dtype and whether torch.compile is used."""
    processor = {case: [] for case in cases(args.eager)}

    def run(case) -> list[float]:
        who, dtype, compiled = case
        job = {"shape": dataclasses.asdict(shape), "dtype": dtype, "compiled": compiled}
        steps, seconds = -(-args.steps // args.rounds), 0.0 if args.debug else LEAST_SECONDS
        done = workers[who].run(do="steps", **job, steps=steps, seconds=seconds)
        processor[case] += done["processor"]
        return done["seconds"]

    times = alternating(processor, run, args.rounds)
    for worker in workers.values():
        worker.run(do="forget")
    medians = {case: statistics.median(seconds) for case, seconds in times.items()}
    best = {
        dtype: min(medians[case] for case in medians if case[0] == "peer" and case[1] == dtype)
        for dtype in DTYPES
    }
    return [
        {
            "shape": name,
            "library": f"{who}{' compiled' if compiled else ''}",
            "dtype": dtype,
            "ms": 1e3 * seconds,
            "min_ms": 1e3 * min(times[who, dtype, compiled]),
            "processor_ms": 1e3 * statistics.median(processor[who, dtype, compiled]),
            "tokens_per_second": shape.B * shape.T / seconds,
            "to_peer_f32": best["float32"] / seconds,
            "to_peer_best": min(best.values()) / seconds,
            "share_of_roof": shape.flops() / seconds / roof[dtype],
        }
        for (who, dtype, compiled), seconds in medians.items()
    ]


def main() -> None:
    parser = arguments(__doc__, "train_step", rounds=5)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ",".join(SHAPES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each, at least")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    names = args.shapes.split(",")
    if not set(names) <= set(SHAPES) or args.steps < 1:
        parser.error(f"--shapes are of {', '.join(SHAPES)}; --steps is at least 1")
    require(*PEERS)
    shapes = {name: SHAPES[name] for name in names}
    if args.debug:
        shapes = {"debug": Shape(L=1, D=32, N=2, T=16, B=2, V=65)}

    result = {"machine": machine("jax", "jaxlib", *PEERS)}
    workers = {who: Worker("train_libraries.py", who) for who in ("ours", "peer")}
    roof = {dtype: workers["ours"].run(do="roof", dtype=dtype) for dtype in DTYPES}
    print("roof: " + ", ".join(f"{dtype} {speed / 1e9:.0f} GF/s" for dtype, speed in roof.items()))
    print("shape  library       dtype         ms   tokens/s  peer f32  peer best  of roof")
    rows = []
    for name, shape in shapes.items():
        for row in measure(workers, name, shape, args, roof):
            print(
                f"{name:6} {row['library']:13} {row['dtype']:8} {row['ms']:8.1f} "
                f"{row['tokens_per_second']:10.0f} {row['to_peer_f32']:8.2f}x "
                f"{row['to_peer_best']:9.2f}x {row['share_of_roof']:8.2f}",
                flush=True,
            )
            rows.append(row)
    for worker in workers.values():
        worker.close()
    result["roof_gflops"] = {dtype: speed / 1e9 for dtype, speed in roof.items()}
    result["shapes"] = {name: dataclasses.asdict(shape) for name, shape in shapes.items()}
    write(args.out, result | {"rows": rows})


if __name__ == "__main__":
    main()
