"""Options of SamplingParams, for commands that generate text.  Starts no JAX."""

import argparse
import dataclasses

from gpt_jax.decode.sampling_params import SamplingParams

# Field -> what it does; the class says it at length.
_NUMBERS = {
    "max_tokens": "most tokens to generate",
    "min_tokens": "fewest",
    "n": "continuations",
    "temperature": "divides the logits; 0: always the most likely token",
    "top_k": "only the k most likely tokens; 0: all",
    "top_p": "only the most likely tokens that together have this probability",
    "min_p": "only tokens at least this fraction as likely as the most likely one",
    "repetition_penalty": "above 1: against tokens of the prompt and the text",
    "presence_penalty": "against tokens that were generated",
    "frequency_penalty": "against them, for each time",
    "no_repeat_ngram": "so many tokens in a row do not occur twice; 0: they may",
    "top_logprobs": "with --logprobs: how many of the most likely tokens are shown beside each",
    "seed": "the same seed gives the same text",
}


def _bias(pair: str) -> tuple[int, float]:
    token_id, _, bias = pair.partition(":")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{pair!r} is not ID:BIAS, such as 13:-100") from None


_LISTS = {
    "stop": (str, "text that ends it, and is not part of it"),
    "stop_ids": (int, "id that ends it"),
    "logit_bias": (_bias, "ID:BIAS, added to the logit of a token"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """An option for each field, by its name."""
    group = parser.add_argument_group("sampling")
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name, told in _NUMBERS.items():
        kind, default = type(defaults[name]), defaults[name]
        told = f"{told} (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=told)
    for name, (kind, told) in _LISTS.items():
        told = f"{told}; repeatable"
        group.add_argument(f"--{name}", type=kind, action="append", default=[], help=told)
    told = "the model's own ids do not end the text"
    group.add_argument("--ignore_eos", action="store_true", help=told)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """What the options say.

    Raises:
      ValueError: A value is not allowed.
    """
    values = {name: getattr(arguments, name) for name in (*_NUMBERS, "ignore_eos")}
    return SamplingParams(**values, **{name: tuple(getattr(arguments, name)) for name in _LISTS})
