"""Which prompts are read together, and what of them is known already."""

import dataclasses
from collections import deque
from collections.abc import Sequence

from gpt_jax.decode.jobs import Job, reads_whole
from gpt_jax.decode.loop import top_size
from gpt_jax.decode.prefill import Prefill
from gpt_jax.decode.prefixes import Prefixes
from gpt_jax.decode.prompts import MIN_BUCKET, bucket
from gpt_jax.models.transformer import Cache, Transformer
from gpt_jax.types import Tree

# Most float32 logits of a chunk whose tokens are scored: 128 MiB.
_MAX_LOGITS = 1 << 25


@dataclasses.dataclass
class Read:
    """A prompt that was read, with samples that wait for a place.

    Attributes:
      job: Whose it is.
      cache: Holds all but its last token.
      index: Its row there.
      next_sample: The next one that gets a place.
    """

    job: Job
    cache: Cache
    index: int
    next_sample: int = 0

    @property
    def num_left(self) -> int:
        return self.job.num_rows - self.next_sample


class Reader:
    """Reads prompts, a chunk at a time: short ones together, a long one alone.

    Attributes:
      jobs: Those whose prompts are being read.
      prefixes: What earlier ones left.
      num_tokens: Of all prompts so far.
      num_cached: How many of them were known.
      num_hits: How many prompts began like an earlier one.
    """

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        *,
        vocab_size: int,
        start_id: int,
        chunk: int,
        prefix_cache_tokens: int,
    ):
        """
        Args:
          model: The Transformer.
          params: Its parameters.
          vocab_size: Ids from here on are never reported.
          start_id: What a decoder with an encoder begins with.
          chunk: Most tokens of a chunk; a model that reads prompts whole has only one.
          prefix_cache_tokens: Places for what earlier prompts left.
        """
        self._model, self._params, self._vocab_size = model, params, vocab_size
        self._start_id, self._chunk = start_id, chunk
        self._has_encoder = model.config.family == "encoder_decoder"
        self._whole = reads_whole(model.config)
        self._prefill: Prefill | None = None
        self.jobs: list[Job] = []
        self.prefixes = Prefixes(0 if self._whole else prefix_cache_tokens)
        self.num_tokens = self.num_cached = self.num_hits = 0

    def text(self, job: Job) -> Sequence[int]:
        """What the decoder reads first."""
        return (self._start_id,) if self._has_encoder else job.request.prompt

    def begin(self, waiting: deque[Job], num_free: int) -> None:
        """Takes the next jobs for which there are places, as many as fit one chunk."""
        assert not self.jobs, "one chunk is read at a time"
        group: list[Job] = []
        num_rows, num_known, known = 0, 0, None
        while waiting and not num_known:
            job = waiting[0]
            if (job.num_rows and num_rows >= num_free) or (group and not self._fits(group, job)):
                break
            if not job.request.prompt_logprobs:  # of what is known the logits are not
                num_known, known = self.prefixes.longest(self.text(job))
                if group and num_known:  # it is read alone, next time
                    num_known = 0
                    break
            group.append(waiting.popleft())
            num_rows += job.num_rows
        if not group:
            return
        group[0].cached_tokens = num_known
        self.num_tokens += sum(len(job.request.prompt) for job in group)
        self.num_cached += num_known
        self.num_hits += num_known > 0
        top = top_size([job.request.params for job in group])
        self.jobs = group
        self._prefill = Prefill(
            self._model,
            self._params,
            [self.text(job) for job in group],
            chunk=self._chunk_for(group),
            vocab_size=self._vocab_size,
            sources=[job.request.prompt for job in group] if self._has_encoder else None,
            known=known,
            num_known=num_known,
            top=top if group[0].request.prompt_logprobs else None,
        )

    def advance(self) -> list[Read]:
        """Reads a chunk; what is ready with it, with the scores of its tokens."""
        assert self._prefill is not None
        if not self._prefill.done:
            self._prefill.advance()
        if not self._prefill.done:
            return []
        group, prefill = self.jobs, self._prefill
        self.drop()
        for index, job in enumerate(group):
            self.prefixes.add(self.text(job), prefill.cache, index)
            if job.request.prompt_logprobs:
                k = job.request.params.top_logprobs
                scores = [token._replace(top=token.top[:k]) for token in prefill.scores[index]]
                job.prompt_tokens = [None, *scores]
        return [
            Read(job, prefill.cache, index) for index, job in enumerate(group) if not job.cancelled
        ]

    def drop(self) -> None:
        """Forgets what is being read."""
        self.jobs, self._prefill = [], None

    def _fits(self, group: list[Job], job: Job) -> bool:
        """Whether a job can be read in one chunk with a group."""
        if job.request.prompt_logprobs != group[0].request.prompt_logprobs:
            return False
        longest = max(len(other.request.prompt) for other in [*group, job])
        return bucket(len(group) + 1) * bucket(longest, MIN_BUCKET) <= self._budget(job)

    def _budget(self, job: Job) -> int:
        """Tokens of a chunk."""
        if not job.request.prompt_logprobs:
            return self._chunk
        fitting = max(MIN_BUCKET, _MAX_LOGITS // self._model.config.vocab_size)
        return min(self._chunk, 1 << (fitting.bit_length() - 1))

    def _chunk_for(self, group: list[Job]) -> int:
        """Most tokens of one row in one call."""
        if self._whole or len(group) > 1:
            return bucket(max(len(job.request.prompt) for job in group), MIN_BUCKET)
        return self._budget(group[0])
