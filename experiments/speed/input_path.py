"""The input path: tokenizing, rows, and how long the quickstart's loop waits for them.

    python experiments/speed/input_path.py [--rounds=3] [--steps=60]

Three questions, on the source of Python's standard library, with a BPE of 2,048 entries:

- MB/s (10^6 bytes of UTF-8) of our stream (`prepare_stream`: pieces, ids, files) and of
  `Tokenizer.encode_batch`, beside the library `tokenizers` alone with the same tokenizer.json,
  given whole documents; by turns;
- tokens/s of packed rows, read in one thread and through the pipeline's threads;
- which share of the quickstart's steps the loop spends in `next(batches)` and in placing the arrays
  on the device. The loop of `gpt-jax train` itself is timed, the first five steps left out; no
  metric of a run records this.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time

from measuring import ROOT, Worker, alternating, answer_jobs, arguments, machine, spread, write

LENGTH, BATCH, VOCABULARY, SKIPPED = 256, 8, 2048, 5  # the quickstart's


class Texts:
    """What prepare_stream asks of documents."""

    label = "the standard library"

    def __init__(self, texts: list[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> str:
        return self._texts[i]

    def document_name(self, i: int) -> str:
        return str(i)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def tokenizing(texts: list[str], tokenizer, rounds: int) -> list[dict]:
    """MB/s of ours and of the library alone; their tokens must be the same."""
    import tokenizers

    from gpt_jax.data.stream import prepare_stream

    raw = tokenizers.Tokenizer.from_str(tokenizer.json)
    raw.encode_special_tokens = True

    def stream() -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepare_stream(Texts(texts), tokenizer, folder)

    cases = {
        "tokenizers, encode_batch": lambda: raw.encode_batch(texts, add_special_tokens=False),
        "tokenizers, encode_batch_fast": lambda: raw.encode_batch_fast(
            texts, add_special_tokens=False
        ),
        "ours, Tokenizer.encode_batch": lambda: tokenizer.encode_batch(texts),
        "ours, prepare_stream": stream,
    }
    sample = texts[: min(100, len(texts))]
    assert tokenizer.encode_batch(sample) == [
        item.ids for item in raw.encode_batch(sample, add_special_tokens=False)
    ]
    times = alternating(cases, lambda name: [timed(cases[name])], rounds)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    raw_best = min(seconds for name, seconds in medians.items() if name.startswith("tokenizers"))
    return [
        {
            "what": name,
            "megabytes_per_second": megabytes / seconds,
            "to_raw_best": raw_best / seconds,
            "seconds": spread(times[name]),
        }
        for name, seconds in medians.items()
    ]


def rows_per_second(texts: list[str], tokenizer, batches: int, rounds: int) -> list[dict]:
    """Tokens/s of packed rows."""
    from gpt_jax.data.mixture import Mixture
    from gpt_jax.data.packing import Rows
    from gpt_jax.data.pipeline import train_batches
    from gpt_jax.data.stream import prepare_stream

    with tempfile.TemporaryDirectory() as folder:
        stream = prepare_stream(Texts(texts), tokenizer, folder)
        rows = Mixture({"train": Rows(stream, LENGTH, tokenizer.vocab_size, tokenizer.eos_id)})

        def direct() -> None:
            for index in range(batches):
                rows.batch(0, BATCH, index)

        def pipeline() -> None:
            for _ in itertools.islice(train_batches(rows, 0, BATCH, 0), batches):
                pass

        next(train_batches(rows, 0, BATCH, 0))  # imports Grain
        cases = {"one thread": direct, "the pipeline": pipeline}
        times = alternating(cases, lambda name: [timed(cases[name])], rounds)
    tokens = batches * BATCH * LENGTH
    return [
        {
            "what": name,
            "tokens_per_second": tokens / statistics.median(seconds),
            "seconds": spread(seconds),
        }
        for name, seconds in times.items()
    ]


def waiting(job: dict) -> dict:
    """A worker's answer: seconds of the quickstart's loop, and of two calls in it."""
    from gpt_jax.cli.main import main
    from gpt_jax.parallel import sharding
    from gpt_jax.train import loop

    calls = {"next": [], "place": []}  # (begin, end) of each
    read, place = loop.train_batches, sharding.global_batch

    def timed_batches(*args):
        batches = read(*args)
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            calls["next"].append((begin, time.perf_counter()))
            yield batch

    def timed_place(*args, **kwargs):
        begin = time.perf_counter()
        arrays = place(*args, **kwargs)
        calls["place"].append((begin, time.perf_counter()))
        return arrays

    loop.train_batches, sharding.global_batch = timed_batches, timed_place
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", f"--config={job['config']}", f"--workdir={folder}/run"]
        words += [f"--config.train.{name}" for name in (
            f"duration={job['steps']} steps", "eval_every=100%", "checkpoint_every=100%",
            "eval_batches=1", "sample_prompts=()", "tensorboard=false",
        )]  # fmt: skip
        try:
            main(words)
        except SystemExit as end:
            assert not end.code, end
    # An evaluation places batches too: after the last step.
    placed = calls["place"][: len(calls["next"])]
    begin, end = calls["next"][SKIPPED][0], calls["next"][-1][0]
    total = end - begin
    sums = {
        name: sum(stop - start for start, stop in spans[SKIPPED:-1])
        for name, spans in (("next", calls["next"]), ("place", placed))
    }
    steps = len(calls["next"]) - 1 - SKIPPED
    return {
        "steps": steps, "ms_step": 1e3 * total / steps, "share_next": sums["next"] / total,
        "share_place": sums["place"] / total,
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        from gpt_jax.parallel.startup import start

        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        start()
        return answer_jobs(waiting)
    parser = arguments(__doc__, "input_path", rounds=3)
    parser.add_argument("--steps", type=int, default=60, help="of the quickstart")
    parser.add_argument("--batches", type=int, default=2000, help="that are read for tokens/s")
    args = parser.parse_args()
    if args.steps < SKIPPED + 5:
        parser.error(f"--steps is at least {SKIPPED + 5}")

    import sysconfig

    from gpt_jax.data.python_stdlib import stdlib_modules
    from gpt_jax.data.tokenizers import train_bpe

    texts = [text for _, text in stdlib_modules(sysconfig.get_path("stdlib"))]
    config = "configs/quickstart.py"
    if args.debug:
        texts, args.batches, args.steps, config = texts[:40], 20, 12, f"{config}:debug"
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    result = {"machine": machine("jax", "tokenizers", "grain"), "megabytes": megabytes}
    print(f"{len(texts)} modules, {megabytes:.1f} MB")

    tokenizer = train_bpe(texts, VOCABULARY)
    result["tokenizing"] = tokenizing(texts, tokenizer, args.rounds)
    for row in result["tokenizing"]:
        print(
            f"{row['what']:30} {row['megabytes_per_second']:6.2f} MB/s "
            f"{row['to_raw_best']:5.2f}x of the library's best"
        )
    result["rows"] = rows_per_second(texts, tokenizer, args.batches, args.rounds)
    for row in result["rows"]:
        print(f"packed rows, {row['what']:17} {row['tokens_per_second']:12,.0f} tokens/s")

    worker = Worker("input_path.py", "--worker")
    result["waiting"] = worker.run(config=config, steps=args.steps)
    worker.close()
    found = result["waiting"]
    print(
        f"quickstart, {found['steps']} steps of {found['ms_step']:.0f} ms: "
        f"{found['share_next']:.3%} waiting for a batch, {found['share_place']:.3%} placing it"
    )
    write(args.out, result)


if __name__ == "__main__":
    main()
