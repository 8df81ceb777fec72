"""The one thread that owns the engine: requests in, pieces of text out."""

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from gpt_jax.decode.constraints import end_reason
from gpt_jax.decode.engine import QueueFull
from gpt_jax.decode.text import TextStream
from gpt_jax.serve.errors import ApiError, from_value_error, internal, too_long, too_many
from gpt_jax.serve.generation import Generation, Piece, Prompted
from gpt_jax.serve.programs import Programs

_LOG = logging.getLogger("gpt_jax.serve")


class _Running:
    """A job of the engine, and whose it is."""

    def __init__(self, generation: Generation, prompt: int, job, tokenizer):
        self.generation, self.prompt, self.job = generation, prompt, job
        request, end_ids = generation.prompted.requests[prompt], generation.prompted.end_ids
        params = request.params
        before = request.prompt if generation.prompted.continues else ()
        self.streams = [
            TextStream(tokenizer, params.stop, end_ids, before) for _ in range(params.n)
        ]
        self.began = time.perf_counter()
        self.last: list[float | None] = [None] * params.n
        self.left = params.n


class Runner:
    """Runs an engine.

    Attributes:
      ready: Whether the first computation is done and nothing broke for good.
      stats: What the engine told after its last step.
      programs: What was compiled since it is ready.
    """

    def __init__(self, make_engine: Callable[[], Any] | None, tokenizer, metrics):
        """
        Args:
          make_engine: Builds the engine; called again where one broke. None: the model writes no
            text, and only `call` is used.
          tokenizer: Turns ids into text.
          metrics: Where times and numbers go.
        """
        self._make_engine, self._tokenizer, self._metrics = make_engine, tokenizer, metrics
        self._engine: Any = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._running: dict[int, _Running] = {}
        self._unstarted: dict[int, _Running] = {}
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ready = False
        self.stats: dict[str, int] = {}
        self.programs = Programs()

    def start(self, warm_up: Callable[[Any], None]) -> None:
        """Starts the thread; `warm_up` gets the engine, or None, before any request does."""
        self._commands.put(lambda: self._warm(warm_up))
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the step that runs; what is unfinished fails."""
        self.ready = False
        self._commands.put(None)
        self._thread.join(timeout)

    @property
    def is_ready(self) -> bool:
        """Whether a request would be worked on."""
        return self.ready and self._thread.is_alive()

    def is_stalled(self, timeout: float) -> bool:
        """Whether one step has been running for longer."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > timeout

    async def submit(self, prompted: Prompted, timeout: float) -> Generation:
        """Begins to generate; all prompts are accepted or none.

        Args:
          prompted: What to generate.
          timeout: Seconds until the engine must have taken it, and again until it must be done.

        Raises:
          ApiError: 400 for a prompt that the engine refuses, 429 where there is no place.
        """
        generation = Generation(prompted, self._cancel_later, timeout)
        self._commands.put(lambda: self._accept(generation))
        try:
            async with asyncio.timeout(timeout):
                await generation.accepted
        except TimeoutError:
            generation.cancel()
            raise too_long(timeout) from None
        except asyncio.CancelledError:
            generation.cancel()
            raise
        return generation

    async def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """A computation between two steps.

        Raises:
          ApiError: it took too long.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future = loop.create_future()

        def run() -> None:
            if result.cancelled():
                return
            try:
                value = function()
            except Exception as error:
                self._tell(loop, lambda error=error: result.done() or result.set_exception(error))
            else:
                self._tell(loop, lambda: result.done() or result.set_result(value))

        self._commands.put(lambda: self._calls.append(run))
        try:
            async with asyncio.timeout(timeout):
                return await result
        except TimeoutError:
            raise too_long(timeout) from None

    def _warm(self, warm_up: Callable[[Any], None]) -> None:
        try:
            engine = None if self._make_engine is None else self._make_engine()
            warm_up(engine)
            self._engine = engine
            self.programs.start()
            self.ready = True
        except Exception:
            _LOG.exception("the model cannot be run")

    def _run(self) -> None:
        while True:
            idle = self._engine is None or self._engine.idle
            try:
                command = self._commands.get(block=idle and not self._calls)
            except queue.Empty:
                # One call, then one step: neither kind of work waits for all of the other.
                if self._calls:
                    self._guarded(self._calls.popleft())
                if not idle:
                    self._guarded(self._step)
                continue
            if command is None:
                break
            self._guarded(command)
        self._fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))
        self.programs.stop()
        self._engine = None
        while not self._commands.empty():  # they find no engine, and say so
            if (command := self._commands.get_nowait()) is not None:
                command()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever fails, the thread goes on."""
        self._busy_since = time.monotonic()
        try:
            work()
            self.programs.trim()
        except Exception:
            _LOG.exception("the engine's thread failed")
            self._recover()
        self._busy_since = None

    def _accept(self, generation: Generation) -> None:
        accepted = generation.accepted
        if accepted.cancelled():
            return
        jobs: list = []
        error: Exception | None = None
        try:
            if self._engine is None:
                raise ApiError(503, "The model is not ready.", code="not_ready")
            for request in generation.prompted.requests:
                jobs.append(self._engine.submit(request))
        except ValueError as refused:
            error = from_value_error(refused)
        except QueueFull:
            error = too_many("The server has no place for this request now; try again later.")
        except ApiError as refused:
            error = refused
        except Exception:
            _LOG.exception("a request could not be begun")
            error = internal()
        if error is not None:
            for job in jobs:
                self._engine.cancel(job)
            self._tell(generation.loop, lambda: accepted.done() or accepted.set_exception(error))
            return
        generation.jobs = jobs
        for prompt, job in enumerate(jobs):
            running = _Running(generation, prompt, job, self._tokenizer)
            self._running[job.id] = self._unstarted[job.id] = running
            self._metrics.prompt(len(job.request.prompt))
        self._tell(generation.loop, lambda: accepted.done() or accepted.set_result(None))

    def _step(self) -> None:
        streams = any(r.generation.prompted.streams for r in self._running.values())
        outputs = self._engine.step(1 if streams else None)
        pieces = [
            (running.generation, piece)
            for job, output in outputs
            if (running := self._running.get(job.id)) is not None
            for piece in self._pieces(running, output)
        ]
        self.stats = self._engine.stats()
        self._observe_started(self.stats["waiting"])
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for generation, piece in pieces:
            by_loop.setdefault(generation.loop, []).append((generation, piece))
        for loop, found in by_loop.items():
            self._tell(loop, lambda found=found: [g.put(piece) for g, piece in found])

    def _pieces(self, running: _Running, output) -> list[Piece]:
        stream = running.streams[output.sample]
        if stream.finish_reason is not None:
            return []
        known = len(stream.tokens)
        text = stream.put(output.tokens, output.finish_reason)
        tokens = tuple(stream.tokens[known:])
        ended_early = stream.finish_reason is not None and output.finish_reason is None
        if ended_early:
            self._engine.end(running.job, output.sample)
        end_ids = running.generation.prompted.end_ids
        by_id = bool(tokens) and tokens[-1].id in end_ids
        by_string = stream.finish_reason == "stop" and not by_id
        if output.finish_reason == "stop" and not by_string:
            ids = [token.id for token in stream.tokens]
            stream.finish_reason = end_reason(running.job.request.constraint, ids)
        self._observe(running, output.sample, len(tokens), stream.finish_reason)
        if stream.finish_reason is not None:
            running.left -= 1
            if not running.left:
                self._running.pop(running.job.id)
        if not (text or tokens or stream.finish_reason):
            return []
        return [Piece(
            running.prompt, output.sample, text, tokens, stream.finish_reason, by_string, by_id
        )]  # fmt: skip

    def _observe(self, running: _Running, sample: int, count: int, reason: str | None) -> None:
        now = time.perf_counter()
        if count:
            last = running.last[sample]
            if last is None:
                self._metrics.first_token(now - running.began)
            else:
                self._metrics.next_tokens((now - last) / count, count)
            running.last[sample] = now
            self._metrics.generated(count)
        if reason is not None:
            self._metrics.finished(reason, now - running.began)

    def _observe_started(self, num_waiting: int) -> None:
        """The engine takes requests in order: those that wait are the last ones."""
        while len(self._unstarted) > num_waiting:
            running = self._unstarted.pop(next(iter(self._unstarted)))
            self._metrics.queued(time.perf_counter() - running.began)

    def _cancel_later(self, generation: Generation) -> None:
        self._commands.put(lambda: self._cancel(generation))

    def _cancel(self, generation: Generation) -> None:
        for job in generation.jobs:
            if self._running.pop(job.id, None) is not None:
                self._unstarted.pop(job.id, None)
                self._engine.cancel(job)
                self._metrics.cancelled()

    def _recover(self) -> None:
        """Fails what was running; an engine that broke in a step may have lost its arrays."""
        self._fail_all(internal())
        if self._make_engine is None:
            return
        try:
            self._engine = self._make_engine()
        except Exception:
            self.ready, self._engine = False, None
            _LOG.exception("the engine could not be made again")

    def _fail_all(self, error: ApiError) -> None:
        generations = {id(r.generation): r.generation for r in self._running.values()}
        self._running.clear()
        self._unstarted.clear()
        for generation in generations.values():
            self._tell(generation.loop, lambda g=generation: g.put(error))

    def _tell(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], Any]) -> None:
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _LOG.debug("a reply came after the end")
