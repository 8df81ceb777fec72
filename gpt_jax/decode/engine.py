"""The engine: requests in token ids come and go, and are decoded together in one batch.

One thread, no clock, no text. What a request gets does not depend on what runs beside it.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from gpt_jax.decode.jobs import Job, QueueFull, check_request
from gpt_jax.decode.loop import MAX_STEPS
from gpt_jax.decode.prompts import as_computed
from gpt_jax.decode.reading import Read, Reader
from gpt_jax.decode.request import Output, Request
from gpt_jax.decode.slots import Row, Slots
from gpt_jax.models.transformer import Transformer
from gpt_jax.types import Tree

__all__ = ["MAX_STEPS", "Engine", "Job", "QueueFull"]

# Steps of the running rows between two chunks of prompts.
_STEPS_BETWEEN_CHUNKS = 4


class Engine:
    """Decodes requests together.

    Attributes:
      model: As it computes: on CPU always in float32 (see decode.prompts.as_computed).
    """

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        *,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] = (),
        max_slots: int = 8,
        max_waiting: int = 1024,
        prefill_chunk: int = 512,
        prefix_cache_tokens: int = 0,
    ):
        """
        Args:
          model: A decoder or an encoder_decoder with the head "lm".
          params: Its parameters, without Flax's boxes; where they lie on a mesh, so does the rest.
          vocab_size: Ids from here on are never generated; None: the model's.
          eos_ids: Ids that end a text.
          max_slots: Most texts that are decoded together.
          max_waiting: Most requests that wait for a place.
          prefill_chunk: Most tokens of prompts that are read between two steps of decoding.
          prefix_cache_tokens: Places for keys and values of earlier prompts; 0: none is kept.

        Raises:
          ValueError: The model writes no text or does not have that many ids; a number is below
            its least.
        """
        for name, value, least in (
            ("max_slots", max_slots, 1), ("max_waiting", max_waiting, 0),
            ("prefill_chunk", prefill_chunk, 1), ("prefix_cache_tokens", prefix_cache_tokens, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: {value} is not at least {least}")
        self.model = as_computed(model, params)
        config = self.model.config
        vocab_size = config.vocab_size if vocab_size is None else vocab_size
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"vocab_size: {vocab_size} is not at most the model's {config.vocab_size}"
            )
        params = jax.tree.map(jnp.asarray, params)
        self._mesh = _mesh_of(params)
        if self._mesh is not None and self._mesh.shape.get("stage", 1) > 1:
            raise ValueError(
                f"mesh.stage: {self._mesh.shape['stage']} stages do not decode; lay the parameters "
                "on another mesh"
            )
        self._vocab_size, self._eos_ids = vocab_size, tuple(eos_ids)
        self._max_slots, self._max_waiting = max_slots, max_waiting
        self._has_encoder = config.family == "encoder_decoder"
        # What a decoder with an encoder begins with.
        start_id = config.start_id if config.start_id >= 0 else next(iter(self._eos_ids), -1)
        self._start_id = start_id
        self._reader = Reader(
            self.model, params, vocab_size=vocab_size, start_id=start_id, chunk=prefill_chunk,
            prefix_cache_tokens=prefix_cache_tokens,
        )  # fmt: skip
        self._slots = Slots(self.model, params, vocab_size=vocab_size, max_rows=max_slots)
        self._waiting: deque[Job] = deque()
        self._ready: deque[Read] = deque()
        self._num_jobs = self._num_generated = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reader.jobs or self._ready or self._slots.num_running)

    def stats(self) -> dict[str, int]:
        """Numbers for people: of now, and since the beginning."""
        return {
            "running": self._slots.num_running,
            "waiting": len(self._waiting) + len(self._reader.jobs) + len(self._ready),
            "slots": self._slots.shape.rows,
            "free_slots": self._num_free,
            "prompt_tokens": self._reader.num_tokens,
            "cached_tokens": self._reader.num_cached,
            "generated_tokens": self._num_generated,
            "prefix_hits": self._reader.num_hits,
        }

    def check(self, request: Request) -> None:
        """Raises ValueError where a request cannot be served."""
        check_request(
            request, self.model.config, vocab_size=self._vocab_size, start_id=self._start_id
        )

    def submit(self, request: Request) -> Job:
        """Queues a request.

        Raises:
          ValueError: The request cannot be served; the message begins with the field.
          QueueFull: max_waiting requests wait.
        """
        self.check(request)
        free = max(0, self._num_free - self._num_ready)
        if len(self._waiting) >= self._max_waiting + free:
            raise QueueFull(f"{len(self._waiting)} requests wait already")
        self._num_jobs += 1
        job = Job(self._num_jobs, request)
        self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends all samples of a job, wherever it is; it gets no more outputs."""
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
        self._ready = deque(read for read in self._ready if read.job is not job)
        if all(reading.cancelled for reading in self._reader.jobs):
            self._reader.drop()
        for row in self._slots.running:
            if row.owner is job:
                self._slots.free(row)

    def end(self, job: Job, sample: int) -> None:
        """Ends one sample, which gets no more outputs."""
        job.ended.add(sample)
        if len(job.ended) == job.request.params.n:
            self.cancel(job)
        for row in self._slots.running:
            if row.owner is job and row.sample == sample:
                self._slots.free(row)

    def step(self, num_steps: int | None = None) -> list[tuple[Job, Output]]:
        """Reads at most one chunk of prompts, then decodes some tokens of the running texts.

        Args:
          num_steps: Most tokens of each text, up to MAX_STEPS; None: many, but few while prompts
            wait that could be read. A constraint allows one at a time.

        Returns:
          What is new.
        """
        assert num_steps is None or 1 <= num_steps <= MAX_STEPS, num_steps
        outputs: list[tuple[Job, Output]] = []
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if not self._reader.jobs and not self._ready:
                self._reader.begin(self._waiting, self._num_free)
            if self._reader.jobs:
                for read in self._reader.advance():
                    outputs += self._ready_or_done(read)
            self._place()
            if self._slots.num_running:
                outputs += self._decode(num_steps)
        return outputs

    @property
    def _num_ready(self) -> int:
        return sum(read.num_left for read in self._ready)

    @property
    def _num_free(self) -> int:
        return self._max_slots - self._slots.num_running

    def _ready_or_done(self, read: Read) -> list[tuple[Job, Output]]:
        if read.num_left:
            self._ready.append(read)
            return []
        job = read.job
        return [
            (job, Output(sample, (), "length"))
            for sample in range(job.request.params.n)
            if sample not in job.ended
        ]

    def _place(self) -> None:
        """Gives places to samples whose prompt was read, first come, first served."""
        while self._ready and self._num_free:
            read = self._ready[0]
            if read.next_sample not in read.job.ended:
                row = self._row(read.job, read.next_sample)
                self._fit(row)
                self._slots.put(row, read.cache, read.index)
            read.next_sample += 1
            if not read.num_left:
                self._ready.popleft()

    def _row(self, job: Job, sample: int, *, constrained: bool = True) -> Row:
        request, text = job.request, self._reader.text(job)
        params = request.params
        return Row(
            owner=job,
            sample=sample,
            prompt=text,
            params=params,
            end=min(len(text) + params.max_tokens, self.model.config.seq_len),
            end_ids=frozenset(params.ends(self._eos_ids)),
            constraint=request.constraint() if request.constraint and constrained else None,
        )

    def _fit(self, row: Row) -> None:
        """Makes place for a row, and at once for those that come soon: each size is compiled."""
        num = self._slots.num_running + self._num_ready
        rows = [*self._slots.running, row]
        for job in [*(read.job for read in self._ready), *self._waiting_soon(num)]:
            rows.append(self._row(job, 0, constrained=False))
        num += sum(job.num_rows for job in self._waiting_soon(num))
        self._slots.fit(self._slots.shape_for(num, rows, self._memory(rows)))

    def _waiting_soon(self, num_rows: int) -> Iterator[Job]:
        """Jobs that wait, until there are enough for all places beside num_rows others."""
        for job in self._waiting:
            if num_rows >= self._max_slots:
                break
            num_rows += job.num_rows
            if job.num_rows:
                yield job

    def _memory(self, rows: Sequence[Row]) -> int:
        """Places of the encoder's outputs that rows need."""
        if not self._has_encoder:
            return 0
        return max(len(row.owner.request.prompt) for row in rows)

    def _decode(self, num_steps: int | None) -> list[tuple[Job, Output]]:
        slots = self._slots
        if any(row.constraint is not None for row in slots.running):
            num_steps = 1
        elif num_steps is None:
            could_read = self._reader.jobs or (self._waiting and self._num_free)
            num_steps = _STEPS_BETWEEN_CHUNKS if could_read else MAX_STEPS
        wanted = slots.shape_for(slots.num_running, slots.running, self._memory(slots.running))
        if any(min(row.end, row.length + num_steps) > slots.shape.length for row in slots.running):
            slots.fit(wanted)
        waited_for = bool(self._waiting or self._ready)
        outputs, most = [], 0
        for row, tokens, reason in slots.decode(num_steps, leave_early=waited_for):
            outputs.append((row.owner, Output(row.sample, tuple(tokens), reason)))
            self._num_generated += len(tokens)
            most = max(most, len(tokens))
        if slots.num_running and not waited_for:
            slots.shrink(wanted, most)
        return outputs


def _mesh_of(params: Tree) -> jax.sharding.Mesh | None:
    """The mesh that parameters lie on; None for one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
