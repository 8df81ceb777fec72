"""Greedy decoding of gpt_jax against Hugging Face's transformers on this machine's CPU.

    pip install -e '.[peers]'
    python experiments/speed/decode.py [--shapes=stories,smollm] [--batches=1,8] [--rounds=5]
    python experiments/speed/decode.py --streams=32

Both have the same random weights in the shapes of two Llamas (tied head), prompts of 32 random
tokens and 128 new ones; nothing ends a text early. Ours runs in float32, in bfloat16 and
with 8-bit weights, transformers (`generate` with its default cache) in float32 and bfloat16. Each
library lives in a process of its own with two threads, and their calls alternate; the figures are
medians. That ours and theirs write the same tokens in float32 is checked first.

A step's time is that of 128 new tokens less that of one, over 127; tokens/s is of the whole call,
reading of the prompt included. A step reads every weight once and the cache as far as it reaches:
those bytes over its time, over the speed at which the same process sums a large array, is the
share of the roof. Compilation is timed apart.

--streams measures decode.engine.Engine instead: so many requests at once against a single one, and
when each got its first token.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from decode_libraries import NEW, PROMPT, SHAPES, THREADS, Ours, Peer, bandwidth, prompts
from measuring import PEERS, Worker, alternating, answer_jobs, arguments, machine, require, write

VARIANTS = [
    ("ours", "float32"), ("ours", "bfloat16"), ("ours", "int8"),
    ("peer", "float32"), ("peer", "bfloat16"),
]  # fmt: skip


def work(who: str, folder: str) -> None:
    """A worker: answers jobs {"do", "shape", "dtype", "batch", "new"}."""
    # Read by both libraries when they make their threads.
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if who == "ours":
        from gpt_jax.parallel.startup import keep_memory

        keep_memory()
    made = {}

    def library(key: tuple[str, str]):
        if key not in made:
            for other in [k for k in made if k[0] != key[0]]:  # one shape in memory
                del made[other]
            made[key] = {"ours": Ours, "peer": Peer}[who](*key, folder)
        return made[key]

    def answer(job: dict):
        if job["do"] == "bandwidth":
            return bandwidth()
        one = library((job["shape"], job["dtype"]))
        if job["do"] == "gap":
            return one.gap(job["text"], job["ours"], job["theirs"])
        texts = prompts(job["shape"], job["batch"])
        if job["do"] == "streams":
            return one.streams(texts)
        start = time.perf_counter()
        tokens = one.generate(texts, job["new"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "weight_bytes": one.weight_bytes}

    answer_jobs(answer)


def cache_bytes(shape: str, batch: int, itemsize: int) -> float:
    """What a step reads of keys and values, at the middle of a text."""
    s = SHAPES[shape]
    width = s["num_key_value_heads"] * s["hidden_size"] // s["num_attention_heads"]
    return 2 * s["num_hidden_layers"] * batch * (PROMPT + NEW / 2) * width * itemsize


def measure(workers: dict[str, Worker], shape: str, batch: int, rounds: int, roof: float) -> list:
    """Rows of one shape and batch, by library and dtype."""
    texts, compile_s, weights = {}, {}, {}
    for who, dtype in reversed(VARIANTS):  # the peer first: it leaves the weights
        job = {"do": "generate", "shape": shape, "dtype": dtype, "batch": batch}
        first = workers[who].run(**job, new=NEW)
        workers[who].run(**job, new=1)
        again = workers[who].run(**job, new=NEW)
        compile_s[who, dtype] = max(0.0, first["seconds"] - again["seconds"])
        texts[who, dtype], weights[who, dtype] = first["tokens"], first["weight_bytes"]
    check_same(workers["peer"], shape, batch, texts["ours", "float32"], texts["peer", "float32"])

    def seconds(key) -> list[float]:
        (who, dtype), new = key
        job = {"do": "generate", "shape": shape, "dtype": dtype, "batch": batch, "new": new}
        return [workers[who].run(**job)["seconds"]]

    cases = [(case, new) for case in VARIANTS for new in (1, NEW)]
    times = alternating(cases, seconds, rounds)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    peer_best = min(medians[("peer", dtype), NEW] for dtype in ("float32", "bfloat16"))
    rows = []
    for case in VARIANTS:
        step = (medians[case, NEW] - medians[case, 1]) / (NEW - 1)
        read = weights[case] + cache_bytes(shape, batch, 2 if case == ("peer", "bfloat16") else 4)
        rows.append({
            "shape": shape, "batch": batch, "library": case[0], "dtype": case[1],
            "tokens_per_second": batch * NEW / medians[case, NEW],
            "best_tokens_per_second": batch * NEW / min(times[case, NEW]),
            "to_peer_best": peer_best / medians[case, NEW],
            "to_peer_f32": medians[("peer", "float32"), NEW] / medians[case, NEW],
            "ms_step": 1e3 * step, "ms_first": 1e3 * medians[case, 1],
            "megabytes_step": read / 1e6, "share_of_roof": read / step / roof,
            "compile_s": compile_s[case],
        })  # fmt: skip
    return rows


# In f32, 30 layers of these weights are worth about so much of rounding.
NEAR_TIE = 1e-3


def check_same(peer: Worker, shape: str, batch: int, ours: list, theirs: list) -> None:
    """Texts in f32 are the same up to a place where the peer holds both tokens equally likely."""
    for prompt, a, b in zip(prompts(shape, batch), ours, theirs, strict=True):
        if a == b:
            continue
        i = next(i for i in range(len(a)) if a[i] != b[i])
        job = {"do": "gap", "shape": shape, "dtype": "float32", "batch": batch}
        gap = peer.run(**job, text=prompt + a[:i], ours=a[i], theirs=b[i])
        print(f"{shape}, batch {batch}: tokens differ from place {i} on, by {gap:.1e} deviations")
        if gap > NEAR_TIE:
            raise SystemExit(f"error: {shape}, batch {batch}: other tokens than the peer's")


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"{row['shape']:8} {row['batch']:5} {row['library']:7} {row['dtype']:8} "
            f"{row['tokens_per_second']:9.0f} {row['to_peer_f32']:8.2f}x "
            f"{row['to_peer_best']:9.2f}x {row['ms_step']:8.2f} {row['ms_first']:9.1f} "
            f"{row['megabytes_step']:7.0f} {row['share_of_roof']:8.2f} {row['compile_s']:8.1f}",
            flush=True,
        )


def measure_streams(worker: Worker, num_streams: int, rounds: int) -> dict:
    """The stories shape: many requests at once, and one alone, by turns."""
    job = {"do": "streams", "shape": "stories", "dtype": "float32"}
    runs = {1: [], num_streams: []}
    for i in range(rounds + 1):
        for batch, results in runs.items():
            result = worker.run(**job, batch=batch)
            if i:  # the first one compiles
                results.append(result)
    speed = {
        batch: batch * NEW / statistics.median(run["seconds"] for run in results)
        for batch, results in runs.items()
    }
    first = sorted(1e3 * x for run in runs[num_streams] for x in run["first"])
    return {
        "streams": num_streams,
        "tokens_per_second": speed[num_streams],
        "one_stream_tokens_per_second": speed[1],
        "ratio": speed[num_streams] / speed[1],
        "ttft_ms_p50": first[len(first) // 2],
        "ttft_ms_p99": first[min(len(first) - 1, int(0.99 * len(first)))],
    }


def main() -> None:
    parser = arguments(__doc__, "decode", rounds=5)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ",".join(SHAPES))
    parser.add_argument("--batches", default="1,8", help="texts decoded together")
    parser.add_argument("--streams", type=int, help="measure the engine with so many requests")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.folder)
    names, batches = args.shapes.split(","), [int(b) for b in args.batches.split(",")]
    if args.debug:
        names, batches, args.rounds = ["stories"], [1], 1
    if not set(names) <= set(SHAPES):
        parser.error(f"--shapes are of {', '.join(SHAPES)}")
    if args.streams and args.out == parser.get_default("out"):
        args.out = args.out.replace("decode.json", "streams.json")
    require(*PEERS)

    result = {"machine": machine("jax", "jaxlib", *PEERS)}
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            who: Worker("decode.py", f"--worker={who}", f"--folder={folder}")
            for who in ("ours", "peer")
        }
        if args.streams:
            # The peer leaves the weights.
            workers["peer"].run(do="generate", shape="stories", dtype="float32", batch=1, new=1)
            result |= measure_streams(workers["ours"], args.streams, args.rounds)
            print(json.dumps(result, indent=2))
        else:
            result["roof_gigabytes_per_second"] = workers["ours"].run(do="bandwidth") / 1e9
            print(f"roof: {result['roof_gigabytes_per_second']:.1f} GB/s read")
            print(
                "shape    batch library dtype     tokens/s  peer f32  peer best  ms/step  ms first "
                "MB/step  of roof compile s"
            )
            result["rows"] = []
            for name in names:
                for batch in batches:
                    roof = result["roof_gigabytes_per_second"] * 1e9
                    rows = measure(workers, name, batch, args.rounds, roof)
                    print_rows(rows)
                    result["rows"] += rows
        for worker in workers.values():
            worker.close()
    write(args.out, result)


if __name__ == "__main__":
    main()
