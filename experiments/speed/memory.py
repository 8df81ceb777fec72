"""Memory of a training step of GPT-2's size: ours against Hugging Face's GPT2LMHeadModel.

    pip install -e '.[peers]'
    python experiments/speed/memory.py [--length=256] [--batch=1] [--rounds=2]

12 layers of 768, vocabulary 50,304, AdamW (train_libraries.py). Every case is a process of its own,
which makes three steps. Its peak is the most that it ever held (VmHWM, so Linux): with its library
imported ("before"), with the model made ("made"; the peer's slots are made by its first step), and
after the steps. The last less the first, a parameter, is the step's: 4 bytes each for parameter,
gradient and AdamW's two slots are 16, activations come on top.

"kept": with memory that is freed kept by the process, as `gpt-jax train` does for speed
(parallel/host_memory.py); "freed": without.
"""

import argparse
import dataclasses

from measuring import PEERS, Worker, alternating, arguments, machine, require, spread, write
from train_libraries import SHAPES, Shape

DTYPES = ("float32", "bfloat16")
KINDS = {"kept": ("ours",), "freed": ("ours", "--freed"), "peer": ("peer",)}
TINY = Shape(L=1, D=64, N=1, T=16, B=1, V=65)


def one_process(kind: str, dtype: str, shape: Shape) -> dict[str, float]:
    """Peak of a process before and after its steps, and its parameters."""
    worker = Worker("train_libraries.py", *KINDS[kind])
    # A tiny model's step imports all that a large one's does.
    job = {"do": "steps", "dtype": dtype, "steps": 1}
    worker.run(**job, shape=dataclasses.asdict(TINY), warmup=0)
    worker.run(do="forget")
    before = worker.run(do="memory")
    job |= {"shape": dataclasses.asdict(shape)}
    worker.run(**job | {"steps": 0}, warmup=0)
    made = worker.run(do="memory")
    done = worker.run(**job | {"steps": 3}, warmup=0)
    peak = worker.run(do="memory")
    worker.close()
    return {"peak": peak, "made": made, "before": before, "parameters": done["parameters"]}


def main() -> None:
    parser = arguments(__doc__, "memory", rounds=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    require(*PEERS)
    shape = dataclasses.replace(SHAPES["gpt2"], T=args.length, B=args.batch)
    if args.debug:
        shape = dataclasses.replace(TINY, L=2)
    cases = [(kind, dtype) for kind in args.kinds.split(",") for dtype in DTYPES]
    figures = alternating(cases, lambda case: [one_process(*case, shape)], args.rounds)

    rows = []
    for (kind, dtype), runs in figures.items():
        num = runs[0]["parameters"]
        own = [run["peak"] - run["before"] for run in runs]
        rows.append({
            "case": kind, "dtype": dtype, "parameters": num,
            "peak_mib": spread([run["peak"] / 2**20 for run in runs]),
            "made_mib": spread([run["made"] / 2**20 for run in runs]),
            "before_mib": spread([run["before"] / 2**20 for run in runs]),
            "bytes_per_parameter": spread([x / num for x in own]),
        })  # fmt: skip
    peers = [row["peak_mib"]["median"] for row in rows if row["case"] == "peer"]
    print(f"{rows[0]['parameters']:,} parameters, batch {shape.B} of {shape.T}")
    print("case   dtype     peak MiB  made MiB  before MiB  bytes/parameter  of peer's least")
    for row in rows:
        row["to_peer"] = row["peak_mib"]["median"] / min(peers) if peers else None
        to_peer = f"{row['to_peer']:.2f}" if peers else ""
        print(
            f"{row['case']:6} {row['dtype']:8} {row['peak_mib']['median']:9.0f} "
            f"{row['made_mib']['median']:9.0f} {row['before_mib']['median']:11.0f} "
            f"{row['bytes_per_parameter']['median']:16.1f} {to_peer:>16}"
        )
    result = {"machine": machine("jax", "jaxlib", *PEERS), "shape": dataclasses.asdict(shape)}
    write(args.out, result | {"rows": rows})


if __name__ == "__main__":
    main()
