"""The rows that are decoded together: their places, and what the host knows of them.

B rows, S cache length, V vocabulary, E ids that end a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.decode import caches, loop
from gpt_jax.decode.loop import Needs, RowParams, State, Steps, bias_of, rules_of, top_size
from gpt_jax.decode.prompts import MIN_BUCKET, bucket
from gpt_jax.decode.request import Constraint, Token
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.ops import sampling
from gpt_jax.ops.penalties import Penalties
from gpt_jax.parallel import sharding
from gpt_jax.types import Tree

# The shortest cache: one program for all short texts is worth more than a few places not read.
_SHORTEST = 256
# A cache is made for so many tokens to come; longer texts make it grow.
_AHEAD = 512
# Tokens that are decoded with less than half of the places in use before the batch shrinks: another
# size may have to be compiled.
_PATIENCE = 128
_NEUTRAL = SamplingParams(temperature=0.0)


@dataclasses.dataclass(eq=False)
class Row:
    """A text under way.

    Attributes:
      owner: Whose it is.
      sample: Its number there.
      prompt: What it began with, on the decoder's side.
      params: How it goes on.
      end: Its length, prompt included, at which it is done.
      end_ids: Ids that end it.
      constraint: What may come next.
      length: Its tokens so far.
      last: The last of them.
    """

    owner: Any
    sample: int
    prompt: Sequence[int]
    params: SamplingParams
    end: int
    end_ids: frozenset[int]
    constraint: Constraint | None = None
    length: int = 0
    last: int = 0

    def __post_init__(self):
        self.length, self.last = len(self.prompt), self.prompt[-1]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a batch: rows, places of a row, places of an encoder's outputs."""

    rows: int
    length: int
    memory: int = 0


class Slots:
    """A batch whose rows come and go.

    Attributes:
      rows: Who has each place; None: nobody.
      shape: Sizes on the device.
    """

    def __init__(self, model: Transformer, params: Tree, *, vocab_size: int, max_rows: int):
        self._model, self._params = model, params
        self._vocab_size, self._max_rows = vocab_size, max_rows
        self._state: State | None = None
        self._fixed: tuple[RowParams, Needs] | None = None
        self._unused_steps = 0
        self.rows: list[Row | None] = []
        self.shape = Shape(0, 0)

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def num_running(self) -> int:
        return sum(row is not None for row in self.rows)

    def shape_for(self, num_rows: int, rows: Sequence[Row], memory: int) -> Shape:
        """Sizes for num_rows rows, these among them, with an encoder's outputs of this length."""
        context = self._model.config.seq_len
        length = max(min(row.end, row.length + _AHEAD) for row in rows)
        return Shape(
            min(bucket(num_rows), self._max_rows),
            min(bucket(length, _SHORTEST), context),
            min(bucket(memory, MIN_BUCKET), context) if memory else 0,
        )

    def fit(self, wanted: Shape) -> None:
        """Grows to at least these sizes; an empty batch gets exactly them."""
        if not self.num_running:
            if self._state is None or wanted != self.shape:
                self._state = None  # frees the old before the new is made
                cache = caches.empty(self._model, wanted.rows, wanted.length, wanted.memory)
                self._state, self.shape = State(cache), wanted
                self.rows = [None] * wanted.rows
                self._fixed = None
            return
        now = self.shape
        self._resize(Shape(
            max(now.rows, wanted.rows), max(now.length, wanted.length),
            max(now.memory, wanted.memory),
        ))  # fmt: skip

    def shrink(self, wanted: Shape, num_steps: int) -> None:
        """Shrinks to these sizes when they have been enough for many steps."""
        now = self.shape
        if wanted.rows >= now.rows and wanted.length >= now.length:
            self._unused_steps = 0
            return
        self._unused_steps += num_steps
        if self._unused_steps >= _PATIENCE:
            smaller = Shape(
                min(now.rows, wanted.rows), min(now.length, wanted.length), now.memory
            )  # fmt: skip
            self._resize(smaller)

    def _resize(self, shape: Shape) -> None:
        self._unused_steps = 0
        if shape == self.shape:
            return
        kept = [i for i, row in enumerate(self.rows) if row is not None]
        assert len(kept) <= shape.rows, (kept, shape)
        rows_B = np.zeros(shape.rows, np.int32)
        rows_B[: len(kept)] = kept
        self._state = loop.resized(
            self._state, rows_B, length=shape.length, memory_length=shape.memory
        )
        self.rows = [self.rows[i] for i in kept] + [None] * (shape.rows - len(kept))
        self.shape, self._fixed = shape, None

    def put(self, row: Row, filled: Cache, index: int) -> None:
        """Begins a row, whose prompt but its last token is row `index` of `filled`."""
        slot = self.rows.index(None)
        self.rows[slot], self._fixed = row, None
        self._keep_features()
        prompt_S = np.full(self.shape.length, -1, np.int32)
        prompt_S[: len(row.prompt)] = row.prompt
        bias_V = None
        if self._state.bias_BV is not None:
            bias_V = bias_of(row.params, self._state.bias_BV.shape[1])
        self._state = loop.place(
            self._state, filled, np.int32(index), np.int32(slot), prompt_S, bias_V
        )

    def free(self, row: Row) -> None:
        """Ends a row."""
        self.rows[self.rows.index(row)] = None
        self._fixed = None

    def decode(
        self, num_steps: int, *, leave_early: bool
    ) -> list[tuple[Row, list[Token], str | None]]:
        """Of each row its new tokens, and an Output's finish_reason; one that is done is freed."""
        allowed_BV, stuck = self._allowed()
        results: list[tuple[Row, list[Token], str | None]] = [(row, [], "stop") for row in stuck]
        for row in stuck:
            self.free(row)
        if not self.num_running:
            return results
        self._keep_features()
        if self._fixed is None:
            needs = self._needs()
            self._fixed = jax.device_put(self._row_params()), needs
        fixed, needs = self._fixed
        live_3B = np.zeros((3, self.shape.rows), np.int32)
        for slot, row in enumerate(self.rows):
            live_3B[:, slot] = (0, 1, 0) if row is None else (row.last, row.length, 1)
        self._state, steps = loop.decode(
            self._model, self._params, self._state, fixed, live_3B, np.int32(num_steps),
            np.bool_(leave_early), allowed_BV, needs=needs, vocab_size=self._vocab_size,
        )  # fmt: skip
        steps = sharding.fetch(steps)
        for slot, row in enumerate(self.rows):
            if row is not None and steps.count_B[slot]:
                results.append((row, *self._advance(slot, row, steps)))
        return results

    def _advance(self, slot: int, row: Row, steps: Steps) -> tuple[list[Token], str | None]:
        tokens = []
        for n in range(int(steps.count_B[slot])):
            k = row.params.top_logprobs
            top = zip(
                steps.top_ids_BNk[slot, n, :k].tolist(),
                steps.top_logprobs_BNk[slot, n, :k].tolist(),
                strict=True,
            )
            tokens.append(Token(
                int(steps.tokens_BN[slot, n]), float(steps.logprobs_BN[slot, n]), tuple(top)
            ))  # fmt: skip
        row.length, row.last = row.length + len(tokens), tokens[-1].id
        reason = "length" if row.length >= row.end else None
        if row.last in row.end_ids:
            gave_up = row.constraint is not None and row.constraint.failure
            reason = "length" if gave_up else "stop"
        if reason:
            self.free(row)
        elif row.constraint is not None:
            row.constraint.accept(row.last)
        return tokens, reason

    def _keep_features(self) -> None:
        """What a row needs is there, what none needs is not."""
        B, V = self.shape.rows, self._model.config.vocab_size
        params = [row.params for row in self.running]
        state = self._state

        def kept(array, needed: bool, shape: tuple[int, int], dtype):
            if not needed:
                return None
            return np.zeros(shape, dtype) if array is None else array

        counts = any(map(_is_penalized, params))
        history = any(p.no_repeat_ngram for p in params)
        biased = any(p.logit_bias for p in params)
        self._state = state.replace(
            counts_BV=kept(state.counts_BV, counts, (B, V), np.int32),
            in_prompt_BV=kept(state.in_prompt_BV, counts, (B, V), bool),
            history_BS=kept(state.history_BS, history, (B, self.shape.length), np.int32),
            bias_BV=kept(state.bias_BV, biased, (B, V), np.float32),
        )

    def _needs(self) -> Needs:
        params = [row.params for row in self.running]
        return Needs(
            sampling.kind_for(rules_of(params)), any(p.min_tokens for p in params), top_size(params)
        )

    def _row_params(self) -> RowParams:
        rows = self.rows
        params = [_NEUTRAL if row is None else row.params for row in rows]
        width = bucket(max(len(row.end_ids) for row in self.running), 4)
        end_ids_BE = np.full((len(rows), width), -1, np.int32)
        for slot, row in enumerate(rows):
            if row is not None:
                end_ids_BE[slot, : len(row.end_ids)] = sorted(row.end_ids)
        return RowParams(
            rules=rules_of(params),
            penalties=Penalties(
                np.array([p.repetition_penalty for p in params], np.float32),
                np.array([p.presence_penalty for p in params], np.float32),
                np.array([p.frequency_penalty for p in params], np.float32),
                np.array([p.no_repeat_ngram for p in params], np.int32),
                np.array([p.min_tokens for p in params], np.int32),
            ),
            seeds_B=np.array([p.seed for p in params], np.uint32),
            samples_B=np.array([row.sample if row else 0 for row in rows], np.uint32),
            start_B=np.array([len(row.prompt) if row else 1 for row in rows], np.int32),
            end_B=np.array([row.end if row else 1 for row in rows], np.int32),
            end_ids_BE=end_ids_BE,
        )

    def _allowed(self) -> tuple[np.ndarray | None, list[Row]]:
        """bool[B, V], None without a constraint; and rows whose constraint allows nothing."""
        if all(row.constraint is None for row in self.running):
            return None, []
        allowed_BV = np.ones((self.shape.rows, self._model.config.vocab_size), bool)
        stuck = []
        for slot, row in enumerate(self.rows):
            if row is not None and row.constraint is not None:
                own_V = row.constraint.allowed()[: self._vocab_size]
                if own_V.any():
                    allowed_BV[slot] = False
                    allowed_BV[slot, : len(own_V)] = own_V
                else:
                    stuck.append(row)
        return allowed_BV, stuck


def _is_penalized(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )
