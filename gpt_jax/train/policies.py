"""What follows a step whose loss or gradient is not finite, or whose loss is a spike.

The step itself leaves the update out (train/step.py); here the run halts or goes back.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gpt_jax.optim.durations import Duration
from gpt_jax.parallel.distributed import peers
from gpt_jax.runs import run as layout
from gpt_jax.runs.metrics import MetricsLog, read_rows
from gpt_jax.runs.receipt import add_to_session, last_session

if TYPE_CHECKING:
    from gpt_jax.train.setup import Training

_MOST_REWINDS = 3  # to one checkpoint


class NonFiniteError(FloatingPointError):
    """The loss or the gradient was not finite; the run has stopped and nothing of it was kept.

    Attributes:
      step: Steps done before the one that it happened in.
      index: Of that step's batch.
    """

    def __init__(self, message: str, step: int, index: int):
        super().__init__(message)
        self.step, self.index = step, index


def nonfinite_error(training: "Training", step: int) -> NonFiniteError:
    """Names the step, the rows of its batch and the last good checkpoint."""
    t, config = training, training.config.train
    index = step + int(t.state.index) - int(t.state.step)
    rows = t.data.train.describe(t.config.seed, config.batch_size, index)
    t.checkpoints.settle()  # a step is good when all of it is saved
    steps = t.checkpoints.steps()
    good = f"the last good checkpoint is {steps[-1]}" if steps else "no checkpoint was saved"
    spike = f", or the loss {config.spike_sigma:g} sigma above the last ones"
    message = (
        f"step {step + 1}: the loss or the gradient is not finite"
        f"{spike if config.spike_sigma else ''}; its update was left out and the run has stopped; "
        f"rows of its batch: {rows}; {good}"
    )
    return NonFiniteError(message, step, index)


class Rewinds:
    """train.on_nonfinite "rewind": back to the last checkpoint, and on with later batches.

    Where a run goes back to depends on the steps alone, so that one which is killed and continued
    comes to the same state: the newest checkpoint of the schedule, not one that a signal made.

    Args:
      training: Its state, start and checkpoints change.
    """

    def __init__(self, training: "Training"):
        self._training = training
        self._done: Counter[int] = Counter()  # by the checkpoint that was gone back to

    def go_back(self, error: NonFiniteError) -> str:
        """Restores the checkpoint and moves `index` behind the batch of the error.

        Returns:
          A line for people.

        Raises:
          NonFiniteError: The error, if the run is to halt; the receipt then says so.
        """
        t = self._training
        steps = t.checkpoints.steps()
        if t.config.train.on_nonfinite != "rewind" or not steps:
            raise self._halted(error)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), t.state
        )
        t.state = None  # its memory is the next one's
        state, _, step = t.checkpoints.newest_good(like, self._choose)
        self._done[step] += 1
        if self._done[step] > _MOST_REWINDS:
            again = f"{error}; it went back to checkpoint {step} {_MOST_REWINDS} times"
            raise self._halted(NonFiniteError(again, error.step, error.index)) from error
        saved = int(state.index)
        t.checkpoints.discard_after(step)
        index = np.asarray(error.index + 1, state.index.dtype)
        t.state = state.replace(index=jax.device_put(index, state.index.sharding))
        t.start = step
        if peers().is_first:
            self._record(step, error.step + 1, self._first_index(step, saved), error.index)
        return (
            f"step {error.step + 1}: not finite, or a spike; back to step {step} and on with batch "
            f"{error.index + 1}"
        )

    def _choose(self, steps: list[int]) -> int:
        return max((step for step in steps if self._is_scheduled(step)), default=max(steps))

    def _is_scheduled(self, step: int) -> bool:
        t, config = self._training, self._training.config.train
        fields = ["checkpoint_every"]
        if config.keep_best or config.patience:
            fields.append("eval_every")
        return any(step % steps_of(t, field) == 0 for field in fields)

    def _first_index(self, step: int, saved: int) -> int:
        """The first batch of the window: that of the checkpoint, or where the last window ended."""
        rows = [row for row in self._rows() if row["step"] == step and row.get("event") == "rewind"]
        passed = rows[: self._done[step] - 1]
        return passed[-1]["event/last_batch"] + 1 if passed else saved

    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self._training.workdir / layout.METRICS)

    def _record(self, step: int, bad_step: int, first: int, last: int) -> None:
        """In rows, once however often the run is killed and comes here again, and the receipt."""
        t = self._training
        row = {
            "event": "rewind", "event/nonfinite_step": bad_step, "event/first_batch": first,
            "event/last_batch": last,
        }  # fmt: skip
        if not any({"step": step, **row}.items() <= old.items() for old in self._rows()):
            log = MetricsLog(t.workdir / layout.METRICS, step)
            log.write(step, row)
            log.sync()
            log.close()
        receipt = t.workdir / layout.RECEIPT
        rewind = {"to": step, "nonfinite_step": bad_step, "skipped_batches": [first, last]}
        before = last_session(receipt).get("rewinds", [])
        add_to_session(receipt, {"rewinds": [*before, rewind]})

    def _halted(self, error: NonFiniteError) -> NonFiniteError:
        if peers().is_first:
            receipt = self._training.workdir / layout.RECEIPT
            add_to_session(receipt, {"first_nonfinite": error.step + 1})
        return error


def steps_of(training: "Training", field: str) -> int:
    """A duration of the config's train section in steps, at least one."""
    value = getattr(training.config.train, field)
    return max(1, Duration.parse(f"train.{field}", value).steps(training.clock))
