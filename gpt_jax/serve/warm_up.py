"""What is compiled before the first request, so that it does not wait for that.

A program is made for each size of prompt, each length of cache and each kind of rules, in powers of
two. These are what a first request most often needs; others are compiled when they come, and all of
them are kept on disk (parallel.startup), so that a second start only reads them.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.decode.request import Request
from gpt_jax.decode.sampling_params import SamplingParams

_LOG = logging.getLogger("gpt_jax.serve")
# Tokens of a prompt and of its continuation: a short one with OpenAI's 16; a question with a
# system's message, whose answer may take what the context has.
_SIZES = ((12, 16), (48, 2**20))
_TEMPERATURES = (0.0, 1.0)
# Of a text that becomes a vector.
_TEXT = 12


def requests(opened: OpenModel, whole: bool) -> Iterator[Request]:
    """What is asked for.

    Args:
      opened: The model.
      whole: All of it; else the least that shows that the model runs.
    """
    vocab_size, context = opened.tokenizer.vocab_size, opened.model.config.seq_len
    if not whole:
        yield Request((opened.tokenizer.eos_id,), SamplingParams(max_tokens=1, ignore_eos=True))
        return
    for number, (size, most) in enumerate(_SIZES):
        size = min(size, context // 2)
        for i, temperature in enumerate(_TEMPERATURES):
            # Of another beginning each: what is known is not read again.
            first = (number * len(_TEMPERATURES) + i) % vocab_size
            params = SamplingParams(
                max_tokens=min(most, context - size), temperature=temperature, ignore_eos=True
            )
            yield Request((first,) * size, params)


def warm_up(engine: Any, opened: OpenModel, whole: bool) -> None:
    """Runs them.

    Args:
      engine: What generates; None where the model writes no text but gives vectors.
      opened, whole: As of requests.
    """
    began = time.monotonic()
    if engine is None and whole:
        from gpt_jax.evals.embed import embed

        embed(opened, [[opened.tokenizer.eos_id] * _TEXT], batch_size=1)
    for request in requests(opened, whole) if engine is not None else ():
        job = engine.submit(request)
        while not engine.idle and not engine.step(1):
            pass
        if not engine.idle:
            engine.cancel(job)
    _LOG.info("ready after %.1f seconds of compiling", time.monotonic() - began)
