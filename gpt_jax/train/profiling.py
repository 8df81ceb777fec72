"""train.profile: a trace of some steps, and from it a table of the slowest operations."""

from collections.abc import Callable

import jax
from etils import epath

from gpt_jax.reports.operations import read_operations, write_operations
from gpt_jax.types import Tree

PROFILE = "profile"  # the folder in the run directory


class Profiler:
    """Traces the steps of a range as the loop comes to them; what it computes stays the same.

    Args:
      steps: Which; None: none.
      start: Steps done before.
      workdir: The run directory.
      say: Shows a line to a person.
    """

    def __init__(
        self, steps: range | None, start: int, workdir: epath.Path, say: Callable[[str], None]
    ):
        self._steps = steps or range(0)
        process = jax.process_index()  # each of several has a table of its own
        self._folder, self._say = workdir / (f"{PROFILE}-{process}" if process else PROFILE), say
        self._traced: list[int] = []
        self._tracing = False
        if steps and start + 1 >= steps.stop:
            say(f"profile: step {steps[-1]} was done before; nothing is profiled")

    def begins(self, step: int) -> bool:
        """Whether `begin` is due before a step."""
        return step in self._steps and not self._tracing

    def ends(self, step: int) -> bool:
        """Whether `end` is due after a step."""
        return self._tracing and step == self._steps[-1]

    def begin(self, state: Tree) -> None:
        """Starts the trace when what was asked for before is done."""
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call in Python would be an event
        options.session_id = "steps"
        jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._tracing = True

    def step(self, step: int) -> None:
        """A step is under way."""
        if self._tracing:
            self._traced.append(step)

    def end(self, compiled: Callable[[], str]) -> None:
        """Ends the trace, if one is under way, and writes the table; all steps must be done.

        Args:
          compiled: Gives the step's compiled program as text.
        """
        if not self._tracing:
            return
        self._stop()
        operations = read_operations(_newest(self._folder), compiled())
        write_operations(self._folder, operations, self._traced)
        first, last = self._traced[0], self._traced[-1]
        self._say(f"profile of steps {first} to {last}: {self._folder / 'operations.md'}")

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def close(self) -> None:
        """Ends a trace that an error left open; without a table."""
        if self._tracing:
            self._stop()


def _newest(folder: epath.Path) -> epath.Path:
    traces = folder.glob("plugins/profile/*/*.xplane.pb")
    return max(traces, key=lambda path: path.stat().mtime)
