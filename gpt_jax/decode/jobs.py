"""What the engine knows of a request on its way, and what it refuses."""

import dataclasses

from gpt_jax.decode.request import Request, Token
from gpt_jax.models.config import TransformerConfig


class QueueFull(RuntimeError):
    """As many requests wait as may."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was accepted.

    Attributes:
      id: A number of its own in the engine.
      request: What was asked for.
      prompt_tokens: With the first output, if the request has prompt_logprobs: the prompt's
        tokens; None for the first, before which nothing stands.
      cached_tokens: How many tokens of the prompt an earlier one had left.
      ended: Samples that get no more outputs.
      cancelled: None does.
    """

    id: int
    request: Request
    prompt_tokens: list[Token | None] | None = None
    cached_tokens: int = 0
    ended: set[int] = dataclasses.field(default_factory=set)
    cancelled: bool = False

    @property
    def num_rows(self) -> int:
        """Places that it takes: none where only the prompt is scored."""
        return self.request.params.n if self.request.params.max_tokens else 0


def reads_whole(config: TransformerConfig) -> bool:
    """Whether a prompt can only be read at once."""
    return config.read_prompts_whole or config.family == "encoder_decoder"


def check_request(
    request: Request, config: TransformerConfig, *, vocab_size: int, start_id: int
) -> None:
    """Raises ValueError where a request cannot be served; the message begins with the field.

    Args:
      request: What is asked for.
      config: The model's.
      vocab_size: Ids from here on are unknown.
      start_id: What a decoder with an encoder begins with; -1: nothing is known.
    """
    params, size = request.params, len(request.prompt)
    has_encoder = config.family == "encoder_decoder"
    if not size:
        raise ValueError("prompt: 0 tokens are not at least 1")
    # A decoder's own tokens come behind its prompt.
    fits_whole = has_encoder or not params.max_tokens
    if size > config.seq_len - (not fits_whole):
        right = "at most" if fits_whole else "fewer than"
        raise ValueError(
            f"prompt: {size} tokens are not {right} the model's context of {config.seq_len}"
        )
    biased = [token_id for token_id, _ in params.logit_bias]
    for name, ids in (("prompt", request.prompt), ("logit_bias", biased)):
        unknown = [i for i in ids if not 0 <= i < vocab_size]
        if unknown:
            raise ValueError(f"{name}: {unknown[0]} is not an id from 0 to {vocab_size - 1}")
    if request.prompt_logprobs and reads_whole(config):
        raise ValueError("prompt_logprobs: this model does not read from left to right")
    if has_encoder and start_id < 0:
        raise ValueError("eos_ids: none, but the decoder begins with one")
