"""Token ids in, token ids out: prompts of unequal length, decoded together.

B rows, T prompt tokens, S cache length.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.decode import loop
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Cache, Transformer, make_cache
from gpt_jax.ops import sampling
from gpt_jax.types import Tree

MAX_STEPS = 16
# The shortest prompt and cache that anything is compiled for.
_MIN_BUCKET = 16


class Decoder:
    """Continues prompts with a model.

    Attributes:
      model: As it computes: on CPU always in float32, because the product of one row with a
        matrix is several times slower in bfloat16 there.
    """

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        *,
        vocab_size: int | None = None,
        eos_id: int | None = None,
    ):
        """
        Args:
          model: The Transformer.
          params: Its parameters, without Flax's boxes.
          vocab_size: Ids from here on are never generated; None: the model's.
          eos_id: The id that ends a text; None: none does.

        Raises:
          ValueError: the model does not have that many ids, or does not write text.
        """
        if model.config.head != "lm" or model.config.family == "encoder":
            field, needed = ("family", "decoder") if model.config.head == "lm" else ("head", "lm")
            raise ValueError(
                f"model.{field}: {getattr(model.config, field)!r} writes no text; that needs "
                f"{needed!r}"
            )
        platform = model.platform or jax.default_backend()
        if platform == "cpu":
            model = model.clone(config=dataclasses.replace(model.config, dtype="float32"))
        vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        if vocab_size > model.config.vocab_size:
            raise ValueError(
                f"vocab_size: {vocab_size} is not at most the model's {model.config.vocab_size}"
            )
        self.model = model
        self._params = params
        self._vocab_size = vocab_size
        self._eos_id = -1 if eos_id is None else eos_id

    def start(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> "Decoding":
        """Reads the prompts; params.n rows for each, prompt by prompt.

        An encoder_decoder's prompts are what its encoder reads; its decoder begins with start_id.

        Raises:
          ValueError: a prompt is empty, holds an unknown id, or leaves no place in the context.
        """
        has_encoder = self.model.config.family == "encoder_decoder"
        # A decoder's own tokens come behind its prompt.
        longest = self.model.config.seq_len - (not has_encoder)
        for prompt in prompts:
            self._check(prompt, longest)
        sources = None
        if has_encoder:
            start_id = self.model.config.start_id
            start_id = start_id if start_id >= 0 else self._eos_id
            assert start_id >= 0, "an encoder_decoder without start_id begins with eos_id"
            sources, prompts = prompts, [[start_id]] * len(prompts)
        # The last token of a prompt is the first step's input.
        cached = [prompt[:-1] for prompt in prompts]
        return Decoding(self, prompts, params, self._prefill(cached, sources))

    def _check(self, prompt: Sequence[int], longest: int) -> None:
        if not len(prompt):
            raise ValueError("prompt: 0 tokens are not at least 1")
        if len(prompt) > longest:
            context = self.model.config.seq_len
            right = "at most" if longest == context else "fewer than"
            raise ValueError(
                f"prompt: {len(prompt)} tokens are not {right} the model's context of {context}"
            )
        unknown = [i for i in prompt if not 0 <= i < self._vocab_size]
        if unknown:
            raise ValueError(f"prompt: {unknown[0]} is not an id from 0 to {self._vocab_size - 1}")

    def _prefill(
        self, prompts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None
    ) -> Cache:
        """A cache with at least the prompts' rows and places."""
        config = self.model.config
        num_rows = _bucket(len(prompts))
        if sources is None and not max(map(len, prompts)):
            return make_cache(config, num_rows, 1, config.dtype)
        arguments = _padded(prompts, num_rows, config.seq_len)
        if sources is not None:
            arguments += _padded(sources, num_rows, config.seq_len)
        return loop.prefill(self.model, self._params, *arguments)


def _padded(prompts: Sequence[Sequence[int]], num_rows: int, most: int):
    """int32[num_rows, T] with zeros behind the prompts, and int32[num_rows] lengths."""
    longest = max(1, max(map(len, prompts)))
    tokens_BT = np.zeros((num_rows, _bucket(longest, _MIN_BUCKET, most)), np.int32)
    lengths_B = np.zeros(num_rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)], lengths_B[i] = prompt, len(prompt)
    return tokens_BT, lengths_B


class Decoding:
    """Rows on their way, row n * p + s being sample s of prompt p.

    Attributes:
      num_rows: B, without the rows that fill the batch up to a power of two.
      done: bool[B]; rows that take no more tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        prefilled: Cache,
    ):
        self._decoder = decoder
        context = decoder.model.config.seq_len
        n, self.num_rows = params.n, len(prompts) * params.n
        B = _bucket(self.num_rows)
        # Rows that fill up the batch repeat the first one, but are done from the start.
        row_B = np.where(np.arange(B) < self.num_rows, np.arange(B), 0)
        prompt_B, sample_B = row_B // n, row_B % n
        length_B = np.array([len(prompts[p]) for p in prompt_B], np.int32)
        end_B = np.minimum(length_B + params.max_tokens, context).astype(np.int32)
        self._done_B = np.arange(B) >= self.num_rows
        # Ends rows that the caller is done with; the device learns of it in the next call.
        self._stopped_B = np.zeros(B, bool)

        cache_length = _bucket(int(end_B.max()), _MIN_BUCKET, context)
        cache = loop.spread(prefilled, prompt_B, length_B - 1, length=cache_length)
        last_B = np.array([prompts[p][-1] for p in prompt_B], np.int32)
        self._state = loop.DecodeState(cache, jnp.asarray(last_B), jnp.asarray(self._done_B))
        rules = _rules(params, B)
        self._kind = sampling.kind_for(rules)
        keys_B = loop.row_keys(np.full(B, params.seed, np.uint32), sample_B.astype(np.uint32))
        self._rows = jax.device_put(loop.RowParams(rules, keys_B, end_B))

    @property
    def done(self) -> np.ndarray:
        return (self._done_B | self._stopped_B)[: self.num_rows]

    def stop(self, row: int) -> None:
        """Ends a row."""
        self._stopped_B[row] = True

    def advance(self, num_steps: int = MAX_STEPS) -> list[list[tuple[int, float]]]:
        """The next tokens of each row with their log-probabilities, at most num_steps.

        The log-probability is the model's own, at temperature 1 and without any rule. The id that
        ends a text is among the tokens. A row that is done gets none.
        """
        assert 1 <= num_steps <= MAX_STEPS, num_steps
        decoder = self._decoder
        self._state, *results = loop.decode(
            decoder.model,
            decoder._params,
            self._state,
            self._rows,
            self._stopped_B,
            num_steps,
            eos_id=decoder._eos_id,
            kind=self._kind,
            vocab_size=decoder._vocab_size,
            max_steps=MAX_STEPS,
        )
        tokens_BN, logprobs_BN, count_B, done_B = jax.device_get((*results, self._state.done_B))
        self._done_B = done_B
        rows = zip(tokens_BN, logprobs_BN, count_B[: self.num_rows], strict=False)
        return [
            list(zip(ids_N[:count].tolist(), logprobs_N[:count].tolist(), strict=True))
            for ids_N, logprobs_N, count in rows
        ]


def _bucket(size: int, least: int = 1, most: int | None = None) -> int:
    """The next power of two: few sizes, so few programs to compile."""
    size = max(least, 1 << (size - 1).bit_length())
    return size if most is None else min(size, most)


def _rules(params: SamplingParams, B: int) -> sampling.Rules:
    return sampling.Rules(
        np.full(B, params.temperature, np.float32),
        np.full(B, min(params.top_k, np.iinfo(np.int32).max), np.int32),
        np.full(B, params.top_p, np.float32),
        np.full(B, params.min_p, np.float32),
    )
