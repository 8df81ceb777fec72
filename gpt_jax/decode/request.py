"""What goes into a decoding engine and what comes out, in token ids."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from gpt_jax.decode.sampling_params import SamplingParams


class Token(NamedTuple):
    """A token of a text.

    Attributes:
      id: Its id.
      logprob: Its log-probability under the model's own distribution: at temperature 1, before
        any rule.
      top: The (id, log-probability) of the most likely tokens there, the likeliest first; as many
        as the request asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """Says which tokens may come next in one text; a new one for each sample.

    Attributes:
      failure: "" or why it gave up before the text was complete: an id that ends the text is then
        all that it allows, and the text's finish_reason is "length".
    """

    failure: str

    def allowed(self) -> np.ndarray:
        """bool[V]; an id that ends the text is allowed where the text is complete."""
        ...

    def accept(self, token_id: int) -> None:
        """Goes on by a token that was allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: Ids; an encoder_decoder's encoder reads them.
      params: How to continue; its params.n samples share one reading of the prompt. Stop strings
        are for who turns ids into text.
      constraint: Makes a sample's Constraint.
      prompt_logprobs: Whether the prompt's own tokens are scored.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    constraint: Callable[[], Constraint] | None = None
    prompt_logprobs: bool = False


class Output(NamedTuple):
    """What is new in one sample of a request.

    Attributes:
      sample: Its number, from 0.
      tokens: The next tokens, the one that ended the text among them.
      finish_reason: None while there is more to come; "stop" at an id that ends the text,
        "length" at max_tokens or the end of the context.
    """

    sample: int
    tokens: tuple[Token, ...]
    finish_reason: str | None
