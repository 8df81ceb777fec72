"""Text in, text out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.engine import Engine, Job
from gpt_jax.decode.request import Output, Request, Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.stopping import StopStrings
from gpt_jax.models.transformer import Transformer
from gpt_jax.types import Tree

# Who has an engine of its own decides itself how much it asks for.
_ANY_NUMBER = 2**31


class TextStream:
    """From one text's tokens to its characters.

    Attributes:
      tokens: All that was generated, with the one that ended the text.
      finish_reason: None while more may come; see Completion.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        eos_ids: Sequence[int] = (),
        before: Sequence[int] = (),
    ):
        """
        Args:
          tokenizer: The model's.
          stop: Strings that end the text and are no part of it.
          eos_ids: Ids that do so.
          before: Ids of the text that this one continues; none where it is an answer.
        """
        self._eos_ids = frozenset(eos_ids)
        self._streamer = tokenizer.streamer(before)
        self._stop = StopStrings(stop)
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None

    def put(self, tokens: Sequence[Token], finish_reason: str | None = None) -> str:
        """The text that is certain with these tokens.

        Args:
          tokens: The next ones; those behind the text's end are dropped.
          finish_reason: An Output's.
        """
        assert self.finish_reason is None, "the text has ended"
        text = ""
        for number, token in enumerate(tokens, 1):
            self.tokens.append(token)
            told = finish_reason if number == len(tokens) else None
            if told == "stop" or token.id in self._eos_ids:
                finish_reason = told or "stop"
                break
            text += self._stop.put(self._streamer.put(token.id))
            if self._stop.found:
                self.finish_reason = "stop"
                return text
        if finish_reason:
            text += self._stop.put(self._streamer.flush())
            if self._stop.found:
                finish_reason = "stop"
            text += self._stop.flush()
        self.finish_reason = finish_reason
        return text


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
      finish_reason: "stop" at an id or a string that ends the text, "length" at max_tokens or the
        end of the context.
      tokens: All that was generated, with the one that ended it.
      num_prompt_tokens: Tokens that the model read, with those put before and behind the prompt.
    """

    text: str
    finish_reason: str
    tokens: tuple[Token, ...]
    num_prompt_tokens: int

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; -inf without any."""
        return float(np.mean([token.logprob for token in self.tokens])) if self.tokens else -np.inf


@dataclasses.dataclass
class _Reading:
    """A job's texts so far.

    Attributes:
      job: The engine's.
      streams: One a sample.
      pieces: Those that nobody took yet.
    """

    job: Job
    streams: list[TextStream]
    pieces: list[Piece] = dataclasses.field(default_factory=list)

    @property
    def open(self) -> bool:
        return any(stream.finish_reason is None for stream in self.streams)

    def put(self, output: Output) -> bool:
        """Whether the text ended though the engine would go on."""
        stream = self.streams[output.sample]
        text = stream.put(output.tokens, output.finish_reason)
        if text or stream.finish_reason:
            self.pieces.append(Piece(output.sample, text, stream.finish_reason))
        return bool(stream.finish_reason) and not output.finish_reason

    def completions(self) -> list[Completion]:
        texts = [""] * len(self.streams)
        for piece in self.pieces:
            texts[piece.sample] += piece.text
        size = len(self.job.request.prompt)
        return [
            Completion(text, stream.finish_reason, tuple(stream.tokens), size)
            for text, stream in zip(texts, self.streams, strict=True)
        ]


class Generator:
    """Continues texts with a model and its tokenizer."""

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        tokenizer: Tokenizer,
        *,
        prefix_ids: Sequence[int] | None = None,
        suffix_ids: Sequence[int] | None = None,
        eos_ids: Sequence[int] | None = None,
        max_slots: int = 64,
    ):
        """
        Args:
          model: The Transformer.
          params: Its parameters, without Flax's boxes.
          tokenizer: Ids that only the model has are never generated.
          prefix_ids, suffix_ids: What stands before and behind a prompt that is a text; None: the
            end-of-text token before a decoder's (so begins each document of the training data),
            behind an encoder's.
          eos_ids: Ids that end a text; None: the tokenizer's.
          max_slots: Most texts that are decoded together.

        Raises:
          ValueError: the tokenizer has more ids than the model, or the model writes no text.
        """
        has_encoder = model.config.family == "encoder_decoder"
        eos = (tokenizer.eos_id,)
        self.tokenizer = tokenizer
        self._eos_ids = eos if eos_ids is None else tuple(eos_ids)
        self._prefix = (() if has_encoder else eos) if prefix_ids is None else tuple(prefix_ids)
        self._suffix = (eos if has_encoder else ()) if suffix_ids is None else tuple(suffix_ids)
        self._engine = Engine(
            model, params, vocab_size=tokenizer.vocab_size, eos_ids=self._eos_ids,
            max_slots=max_slots, max_waiting=_ANY_NUMBER,
        )  # fmt: skip
        self._readings: dict[int, _Reading] = {}

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        *,
        best_of: int | None = None,
    ) -> list[Completion]:
        """params.n continuations of each prompt, prompt by prompt; all are decoded together.

        Args:
          prompts: Texts; or ids, which are read as they are.
          params: How to continue them.
          best_of: So many are generated, and the n with the highest mean log-probability of a
            token are given, the best first.

        Raises:
          ValueError: a prompt leaves no place in the model's context; best_of is below n.
        """
        assert not isinstance(prompts, str), "a list of prompts"
        if best_of is not None and best_of < params.n:
            raise ValueError(f"best_of: {best_of} is not at least n {params.n}")
        drawn = dataclasses.replace(params, n=best_of or params.n)
        requests = [Request(self._ids(prompt), drawn) for prompt in prompts]
        for request in requests:
            self._engine.check(request)
        readings: list[_Reading] = []
        try:
            for request in requests:
                readings.append(self._begin(request))
            for reading in readings:
                while reading.open:
                    self._step(None)
        finally:
            for reading in readings:
                self._forget(reading)
        completions = [reading.completions() for reading in readings]
        if best_of is not None:
            completions = [
                sorted(own, key=lambda c: -c.mean_logprob)[: params.n] for own in completions
            ]
        return [completion for own in completions for completion in own]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """The continuations piece by piece, as they come; the same text as complete gives.

        Raises:
          ValueError: the prompt leaves no place in the model's context; at the call, not at the
            first piece.
        """
        request = Request(self._ids(prompt), params)
        self._engine.check(request)
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        reading = self._begin(request)
        try:
            while reading.open or reading.pieces:
                if not reading.pieces:
                    self._step(1)
                pieces, reading.pieces = reading.pieces, []
                yield from pieces
        finally:
            self._forget(reading)

    def _begin(self, request: Request) -> "_Reading":
        params = request.params
        ends = params.ends(self._eos_ids)
        streams = [TextStream(self.tokenizer, params.stop, ends) for _ in range(params.n)]
        reading = _Reading(self._engine.submit(request), streams)
        self._readings[reading.job.id] = reading
        return reading

    def _step(self, num_steps: int | None) -> None:
        """A step of the engine; what is new goes to whom it belongs."""
        for job, output in self._engine.step(num_steps):
            if self._readings[job.id].put(output):
                self._engine.end(job, output.sample)

    def _forget(self, reading: "_Reading") -> None:
        self._engine.cancel(reading.job)
        self._readings.pop(reading.job.id)

    def _ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return (*self._prefix, *self.tokenizer.encode(prompt), *self._suffix)
        return tuple(int(i) for i in prompt)
