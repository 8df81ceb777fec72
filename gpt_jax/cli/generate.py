"""Continues a text with a model.

gpt-jax generate --run=runs/quickstart --prompt='def '
gpt-jax generate --run=gguf:smollm2 --chat --prompt='What is a star?' --temperature=0.7
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from gpt_jax.cli.flags import named_as_typed
from gpt_jax.cli.model_options import add_model, read_model
from gpt_jax.cli.sampling_options import add_sampling, sampling_params

# Name -> what it does.
_TEXTS = {
    "prompt": "text to continue; - reads standard input",
    "suffix": "text that comes behind the gap, for models that were trained to fill one",
    "system": "with --chat: what the system says first",
    "draft": "a smaller model (as --run) that proposes tokens: the same text, sooner",
    "json_schema": "FILE: the text is JSON of this schema",
    "regex": "the text matches it as a whole",
    "grammar": "FILE: the text follows this grammar (Lark)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--chat", action="store_true", help="the prompt is a message to answer")
    for name, told in _TEXTS.items():
        parser.add_argument(f"--{name}", default="", metavar="TEXT", help=told)
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many")
    told = "propose so many tokens from what the text holds already"
    parser.add_argument("--prompt_lookup", type=int, default=0, metavar="K", help=told)
    parser.add_argument("--logprobs", action="store_true", help="show each token's as well")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    add_sampling(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    with named_as_typed(arguments, lookup="prompt_lookup", messages="prompt", spec="run"):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    schema, grammar = (_file(arguments, name) for name in ("json_schema", "grammar"))
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt

    from gpt_jax.convert.open_model import open_model
    from gpt_jax.decode.write import Way, constraint_of, prompt_of, whole, write
    from gpt_jax.parallel.startup import start

    start()
    model = read_model(arguments)
    ids, ends = prompt_of(
        model, prompt, suffix=arguments.suffix, chat=arguments.chat, system=arguments.system
    )
    forms = {"json_schema": schema, "regex": arguments.regex, "grammar": grammar}
    way = Way(
        beams=arguments.beams,
        draft=open_model(arguments.draft, field="--draft") if arguments.draft else None,
        lookup=arguments.prompt_lookup,
        constraint=constraint_of(model, ends=ends, **forms),
    )
    params = dataclasses.replace(params, stop_ids=params.stop_ids + ends)
    # What an encoder reads and what a user says is answered, not continued.
    answers = model.model.config.family == "encoder_decoder" or arguments.chat
    before, behind = ("", "") if answers else (prompt, arguments.suffix)
    # Two streams on one terminal would mix; several continuations are shown one by one.
    if arguments.stream and params.n == 1 and not arguments.logprobs:
        pieces = write(
            model, ids, params, way, streams=True, continues=not answers
        )  # refuses what it cannot take
        sys.stdout.write(before)
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write(behind + "\n")
        return 0
    pieces = write(model, ids, params, way, continues=not answers)
    for number, text in enumerate(whole(pieces, params.n)):
        header = f"--- {number + 1} ({text.finish_reason})\n" if params.n > 1 else ""
        print(f"{header}{before}{text.text}{behind}")
        for token in text.tokens if arguments.logprobs else ():
            shown = [(token.id, token.logprob), *token.top]
            print("  ".join(f"{x:8.3f} {model.tokenizer.token_text(i)!r}" for i, x in shown))
    return 0


def _file(arguments: argparse.Namespace, name: str) -> str:
    """What stands in the file that an option names."""
    path = getattr(arguments, name)
    if not path:
        return ""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {path!r} cannot be read: {error}") from None
