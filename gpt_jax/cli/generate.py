"""Continues a text with a run.

gpt-jax generate --run=runs/quickstart --prompt='def '
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a run directory")
    parser.add_argument("--step", type=int, help="checkpoint (default: the best kept, or newest)")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--n", type=int, default=1, help="continuations")
    parser.add_argument("--stop", action="append", default=[], help="text that ends it; repeatable")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.decode.sampling_params import SamplingParams

    names = ("max_tokens", "n", "temperature", "top_k", "top_p", "min_p", "seed")
    chosen = {name: getattr(arguments, name) for name in names}
    params = SamplingParams(**chosen, stop=tuple(arguments.stop))
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt

    from gpt_jax.decode.text import Generator
    from gpt_jax.parallel.startup import start
    from gpt_jax.runs.run import open_run

    start()
    opened = open_run(arguments.run, arguments.step)
    generator = Generator(opened.model, opened.params, opened.tokenizer)
    # What an encoder reads is answered, not continued.
    shown = "" if opened.config.model.family == "encoder_decoder" else prompt
    # Two streams on one terminal would mix; several continuations are shown one by one.
    if arguments.stream and params.n == 1:
        pieces = generator.stream(prompt, params)  # refuses what it cannot take
        sys.stdout.write(shown)
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0
    for number, completion in enumerate(generator.complete([prompt], params)):
        header = f"--- {number + 1} ({completion.finish_reason})\n" if params.n > 1 else ""
        print(f"{header}{shown}{completion.text}")
    return 0
