"""Text in, text out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.generate import MAX_STEPS, Decoder, Decoding
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.stopping import StopStrings
from gpt_jax.models.transformer import Transformer
from gpt_jax.types import Tree


class Piece(NamedTuple):
    """A part of a streamed text.

    Attributes:
      sample: Which of the params.n continuations.
      text: What follows the piece before; whole characters.
      finish_reason: None, or in the sample's last piece why it ended (see Completion).
    """

    sample: int
    text: str
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A continuation of a prompt.

    Attributes:
      text: Without the prompt and without the stop string.
      finish_reason: "stop" at the end-of-text token or a stop string, "length" at max_tokens or
        the end of the context.
      token_ids: All that was generated, with the token that ended it.
      logprobs: The log-probability of each of them under the model's own distribution, before
        temperature and other rules.
      num_prompt_tokens: Tokens of the prompt, with the end-of-text token before it (in an encoder's
        input behind it).
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_prompt_tokens: int


class Generator:
    """Continues texts with a model and its tokenizer."""

    def __init__(self, model: Transformer, params: Tree, tokenizer: Tokenizer):
        """
        Args:
          model: The Transformer.
          params: Its parameters, without Flax's boxes.
          tokenizer: Ids that only the model has are never generated.

        Raises:
          ValueError: the tokenizer has more ids than the model.
        """
        self.tokenizer = tokenizer
        self._has_encoder = model.config.family == "encoder_decoder"
        self._decoder = Decoder(
            model, params, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        )

    def complete(self, prompts: Sequence[str], params: SamplingParams) -> list[Completion]:
        """params.n continuations of each prompt, prompt by prompt; all are decoded together.

        Raises:
          ValueError: a prompt leaves no place in the model's context.
        """
        if not prompts:
            return []
        prompt_ids = [self._encode(prompt) for prompt in prompts]
        decoding = self._decoder.start(prompt_ids, params)
        rows = [_Row(self.tokenizer, params.stop) for _ in range(decoding.num_rows)]
        texts = [""] * decoding.num_rows
        for row, text in _texts(decoding, rows, MAX_STEPS):
            texts[row] += text
        return [
            Completion(
                text=texts[i],
                finish_reason=row.finish_reason,
                token_ids=tuple(row.token_ids),
                logprobs=tuple(row.logprobs),
                num_prompt_tokens=len(prompt_ids[i // params.n]),
            )
            for i, row in enumerate(rows)
        ]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[Piece]:
        """The continuations piece by piece, as they come; the same text as complete gives.

        Raises:
          ValueError: the prompt leaves no place in the model's context; at the call, not at the
            first piece.
        """
        decoding = self._decoder.start([self._encode(prompt)], params)
        rows = [_Row(self.tokenizer, params.stop) for _ in range(decoding.num_rows)]
        return (
            Piece(row, text, rows[row].finish_reason)
            for row, text in _texts(decoding, rows, 1)
            if text or rows[row].finish_reason
        )

    def _encode(self, prompt: str) -> list[int]:
        if self._has_encoder:  # what an encoder reads ends with it
            return [*self.tokenizer.encode(prompt), self.tokenizer.eos_id]
        # The end-of-text token also begins each document of the training data.
        return [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]


def _texts(decoding: Decoding, rows: list["_Row"], num_steps: int) -> Iterator[tuple[int, str]]:
    """(row, its next text) until all rows have a finish reason, which is set by then."""
    while not decoding.done.all():
        new = decoding.advance(num_steps)
        for i, tokens in enumerate(new):
            if rows[i].finish_reason is None and tokens:
                text = rows[i].put(tokens, last=bool(decoding.done[i]))
                if rows[i].finish_reason:
                    decoding.stop(i)
                yield i, text


class _Row:
    """From a row's tokens to its text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self._eos_id = tokenizer.eos_id
        self._streamer = tokenizer.streamer()
        self._stop = StopStrings(stop)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None

    def put(self, tokens: list[tuple[int, float]], last: bool) -> str:
        """The text that is certain with these tokens; `last`: no more will come."""
        text = ""
        for token_id, logprob in tokens:
            self.token_ids.append(token_id)
            self.logprobs.append(logprob)
            if token_id == self._eos_id:
                self.finish_reason = "stop"
                break
            text += self._stop.put(self._streamer.put(token_id))
            if self._stop.found:
                # What was decoded behind the stop string in the same call is dropped.
                self.finish_reason = "stop"
                return text
        if last and self.finish_reason is None:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._stop.put(self._streamer.flush())
            if self._stop.found:
                self.finish_reason = "stop"
            text += self._stop.flush()
        return text
