"""How well a model goes on with Python functions of its validation split, line by line.

A measure of what a language model is for that is smooth in its compute: the probability of the true
line is computed, not sampled, as it should be where laws are fitted (arXiv:2303.08774, section 3.2,
fits pass rates, which needs a model that passes).
"""

from collections.abc import Sequence

import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.text import Generator
from gpt_jax.evals.likelihood import continuation_logprobs
from gpt_jax.models.transformer import Transformer
from gpt_jax.tasks.python_lines import DIFFICULTIES, ROOM, LinePrompt, is_statement
from gpt_jax.types import Tree

NUM_PROMPTS, NUM_SAMPLES = 256, 4
_MAX_TOKENS = 80  # of a written line
_SEED = 0
_BATCH_SIZE = 32


def score_python_lines(
    model: Transformer, params: Tree, tokenizer: Tokenizer, prompts: Sequence[LinePrompt]
) -> dict[str, float]:
    """The measure's figures over prompts; deterministic.

    Args:
      model: A decoder with head "lm".
      params: Its parameters.
      tokenizer: Its tokenizer.
      prompts: At least one.

    Returns:
      next_line_logprob: mean log-probability, nats, that after the prompt come a line end, exactly
        the true line and its line end; next_line_logprob_<difficulty> over prompts of each.
      next_line_exact: share of prompts where the most likely tokens are just these.
      parse_rate: share of lines sampled at temperature 1, NUM_SAMPLES a prompt, that parse behind
        the prompt; parse_rate_stderr: its standard error over prompts.
      num_prompts.

    Raises:
      ValueError: The model is another.
    """
    assert prompts
    pairs = [(one.prompt, f"\n{one.line}\n") for one in prompts]
    found = continuation_logprobs(model, params, tokenizer, pairs, batch_size=_BATCH_SIZE)
    logprobs = np.array([one.logprob for one in found])
    kinds = np.array([one.difficulty for one in prompts])
    figures = {"next_line_logprob": float(logprobs.mean())}
    for kind in DIFFICULTIES:
        if (kinds == kind).any():
            figures[f"next_line_logprob_{kind}"] = float(logprobs[kinds == kind].mean())
    figures["next_line_exact"] = float(np.mean([one.is_greedy for one in found]))
    rates = _parse_rates(model, params, tokenizer, prompts)
    return figures | {
        "parse_rate": float(rates.mean()),
        "parse_rate_stderr": float(rates.std(ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0,
        "num_prompts": len(prompts),
    }


def _parse_rates(
    model: Transformer, params: Tree, tokenizer: Tokenizer, prompts: Sequence[LinePrompt]
) -> np.ndarray:
    """[prompts] shares of the sampled lines that parse."""
    room = min(ROOM, model.config.seq_len)
    sampling = SamplingParams(
        max_tokens=max(1, _MAX_TOKENS * room // ROOM), n=NUM_SAMPLES, temperature=1.0, seed=_SEED
    )
    generator = Generator(model, params, tokenizer, max_slots=128)
    # The longest first: the cache never grows.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt))
    completions = generator.complete([prompts[i].prompt for i in order], sampling)
    rates = np.zeros(len(prompts))
    for place, i in enumerate(order):
        own = completions[place * NUM_SAMPLES : (place + 1) * NUM_SAMPLES]
        rates[i] = np.mean([is_statement(prompts[i].prompt, one.text) for one in own])
    return rates
