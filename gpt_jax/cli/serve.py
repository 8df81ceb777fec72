"""Serves a model over HTTP, as OpenAI's interface has it, with a page at /.

gpt-jax serve --run=runs/quickstart --port=8000
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{"model": "quickstart", "prompt": "def ", "max_tokens": 32}'
"""

import argparse
import dataclasses
import os

from gpt_jax.cli.flags import named_as_typed
from gpt_jax.cli.model_options import add_model, read_model

# Field of serve.settings.Settings -> help.
_SETTINGS = {
    "host": "address to listen at; 0.0.0.0 lets other machines in, so give --api_keys too",
    "port": "0: a free one",
    "api_keys": "file of bearer keys, one a line; without it everybody is let in",
    "slots": "texts that are generated at the same time",
    "max_waiting": "prompts that may wait for a slot; more get 429",
    "max_requests": "HTTP requests in work at the same time; more get 429",
    "prefill_chunk": "prompt tokens read between two steps of the running texts",
    "prefix_cache_tokens": "tokens of earlier prompts that are kept; 0: none",
    "max_body_bytes": "longest body of a request",
    "max_tokens": "most tokens of a text; 0: the context",
    "max_input_tokens": "most tokens of a text that becomes a vector; 0: the context",
    "max_n": "largest n and best_of",
    "max_prompts": "most prompts of a request",
    "max_choices": "most texts of a request: prompts times n or best_of",
    "head_timeout_s": "seconds in which a request's head must arrive",
    "body_timeout_s": "seconds in which a body must arrive",
    "request_timeout_s": "seconds that an answer may take",
    "template_timeout_s": "seconds that a chat template may run",
    "drain_timeout_s": "seconds for running requests after SIGTERM",
    "stall_timeout_s": "/health fails where one step takes longer",
}
_LISTS = {
    "aliases": ("alias", "another name of the model; repeatable"),
    "cors_origins": ("cors_origin", "web origin whose pages may call the server; repeatable"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gpt_jax.serve.settings import Settings

    add_model(parser)
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, text in _SETTINGS.items():
        default = defaults[name]
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default!r})"
        )
    told = "compile what first requests need before /health says 200"
    parser.add_argument("--warm_up", action=argparse.BooleanOptionalAction, default=True, help=told)
    for name, (flag, text) in _LISTS.items():
        parser.add_argument(
            f"--{flag}", dest=name, action="append", default=[], metavar="TEXT", help=text
        )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    with named_as_typed(arguments, **{name: flag for name, (flag, _) in _LISTS.items()}):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from gpt_jax.serve.settings import Settings

    lists = {name: tuple(getattr(arguments, name)) for name in _LISTS}
    settings = Settings(
        **{name: getattr(arguments, name) for name in (*_SETTINGS, "warm_up")}, **lists
    )
    try:
        from gpt_jax.serve.app import make_app
        from gpt_jax.serve.server import Server, listen
    except ImportError as error:
        raise ValueError(f"serve: {error.name} is missing; install gpt-jax[serve]") from None

    # A port that is taken is told before the model is read.
    with listen(settings) as listener:
        from gpt_jax.parallel.startup import start

        start()
        opened = read_model(arguments)
        # "smollm2" of gguf:smollm2, whose file has another name.
        typed = os.path.basename(arguments.run.rpartition(":")[2].rstrip("/"))
        if typed not in (opened.name, "", *settings.aliases):
            settings = dataclasses.replace(settings, aliases=(*settings.aliases, typed))
        app = make_app(opened, settings)
        host, port = listener.getsockname()[:2]
        print(f"{opened.name} at http://{host}:{port}", flush=True)
        Server(app, settings).run(sockets=[listener])
    return 0
