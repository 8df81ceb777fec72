"""Token ids in, token ids out, all at once."""

from collections.abc import Sequence

from gpt_jax.decode.engine import Engine
from gpt_jax.decode.request import Request, Token
from gpt_jax.decode.sampling_params import SamplingParams


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_steps: int | None = None,
) -> list[list[Token]]:
    """The tokens of params.n continuations of each prompt, prompt by prompt.

    Args:
      engine: With nothing else to do.
      prompts: Ids.
      params: How to continue them.
      num_steps: Most tokens of a text between two looks at the engine.

    Raises:
      ValueError: A prompt cannot be continued; its message begins with the field.
    """
    requests = [Request(tuple(prompt), params) for prompt in prompts]
    for request in requests:
        engine.check(request)
    jobs = [engine.submit(request) for request in requests]
    texts: dict[tuple[int, int], list[Token]] = {
        (job.id, sample): [] for job in jobs for sample in range(params.n)
    }
    while not engine.idle:
        for job, output in engine.step(num_steps):
            texts[job.id, output.sample] += output.tokens
    return list(texts.values())
