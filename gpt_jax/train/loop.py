"""The loop: evaluate -> checkpoint -> next batch -> step -> log."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from gpt_jax.data.pipeline import train_batches
from gpt_jax.evals.during_training import Evaluations
from gpt_jax.parallel import sharding
from gpt_jax.parallel.distributed import peers
from gpt_jax.parallel.peaks import NO_ROOF, Roof, roof_of
from gpt_jax.reports.loss_curve import draw_loss_curve
from gpt_jax.runs import best, events, metrics
from gpt_jax.runs import run as layout
from gpt_jax.runs.goodput import goodput, in_words
from gpt_jax.runs.receipt import add_to_session
from gpt_jax.train.interrupts import INTERRUPTED, Interrupts, SharedInterrupts
from gpt_jax.train.policies import NonFiniteError, Rewinds, nonfinite_error, steps_of
from gpt_jax.train.profiling import Profiler
from gpt_jax.train.progress import Progress
from gpt_jax.train.setup import Training
from gpt_jax.train.speed import Stopwatch, speed_row
from gpt_jax.train.stragglers import Stragglers, find_stragglers
from gpt_jax.train.watchdog import Watchdog

FINISHED = 0


def fit(training: Training) -> int:
    """Trains to the end, or until a signal asks to stop: one to any of the processes.

    Returns:
      FINISHED, or INTERRUPTED after a checkpoint of the step that was reached.

    Raises:
      NonFiniteError: Names the step, the rows of its batch and the last good checkpoint.
    """
    rewinds, process = Rewinds(training), jax.process_index()
    shared = SharedInterrupts(peers()) if peers().count > 1 else Interrupts()
    with contextlib.ExitStack() as closing, shared as interrupts:
        closing.callback(training.lock.close)
        log = events.EventLog(
            training.workdir / events.file_of(process), training.phases, training.start, process
        )
        closing.callback(log.close)
        closing.enter_context(
            Watchdog(
                training.phases, training.config.train.stall_timeout, training.workdir, log,
                process,
            )
        )  # fmt: skip
        closing.push(lambda kind, *_: _close(training, kind))  # before the lock
        stragglers = find_stragglers(peers(), log)
        peers().arrive("before the first step")
        while True:
            loop = _Loop(training, log, stragglers)
            try:
                return loop.run(interrupts)
            except NonFiniteError as error:
                nonfinite = error
            finally:
                loop.close()
            with training.phases.during("restore"):
                told = rewinds.go_back(nonfinite)
            peers().arrive("after going back")
            if peers().is_first:
                print(told, flush=True)
            log.event("rewind", start_step=training.start)


def _close(training: Training, kind: type[BaseException] | None) -> None:
    if kind and peers().count > 1 and not issubclass(kind, NonFiniteError):
        return  # the others may not come, and this process ends at once
    with training.phases.during("save_wait"):  # there may be one under way
        training.checkpoints.close()


@dataclasses.dataclass
class _Pending:
    """Metrics of a step that the device may still be computing."""

    step: int
    values: dict[str, Any]


class _Loop:
    def __init__(self, training: Training, log: events.EventLog, stragglers: Stragglers):
        self._training = t = training
        self._stragglers, self._waiting = stragglers, stragglers.waiting
        self._phases, self._events = t.phases, log
        config = t.config.train
        self._eval_every = steps_of(t, "eval_every")
        self._save_every = steps_of(t, "checkpoint_every")
        resume = t.start if t.checkpoints.steps() else None
        self._sinks = _sinks(t, resume) if peers().is_first else [metrics.NoLog()]
        self._log = self._sinks[0]
        teacher = (t.teacher, t.fixed.teacher) if t.teacher else None
        self._evaluations = Evaluations(
            t.config, t.model, t.objective, t.data, t.mesh, teacher, t.cache_dir,
            t.workdir / layout.SAMPLES if peers().is_first else None, resume,
        )  # fmt: skip
        # With a best to be kept every evaluation is of the same rows, and a checkpoint follows it.
        self._by_metric = bool(config.keep_best or config.patience)
        self._progress = Progress(t.start, t.total, quiet=not peers().is_first)
        self._pending: _Pending | None = None
        self._stopwatch = Stopwatch(t.start)
        self._timed = False  # whether the compilation is behind us
        self._rate: float | None = None  # tokens a second
        self._roof: Roof | None = None  # known after the first step
        self._before = t.phases.totals()  # at the last row
        self._profiler = Profiler(config.profile_steps(), t.start, t.workdir, self._progress.line)
        self._step = t.start
        peers().tell_where(lambda: f"phase {t.phases.now[0]!r} after step {self._step}")

    def run(self, interrupts: Interrupts) -> int:
        t = self._training
        config = t.config.train
        local = sharding.local_rows(config.batch_size, t.mesh)
        batches = train_batches(
            t.data.train, t.config.seed, config.batch_size, int(t.state.index), local
        )
        self._stopwatch.resume()
        step = t.start
        while True:
            fresh = step > t.start  # what was due at the step resumed from has been done
            evaluated = fresh and (step % self._eval_every == 0 or step == t.total)
            if evaluated:
                self._evaluate(step)
            # Rows alone decide, so a run that is continued here stops here too.
            early = bool(config.patience) and (evaluated or not fresh) and self._is_enough()
            stop = interrupts.boundary()  # once: a signal that comes later waits a step
            due = step % self._save_every == 0 or step == t.total or stop or early
            if fresh and (due or (evaluated and self._by_metric)):
                self._save(step)
            if step == t.total or stop or early:
                break
            batch = self._next(batches)
            arrays = sharding.global_batch(batch, local, config.batch_size, t.mesh)
            if self._profiler.begins(step + 1):
                self._profiler.begin(t.state)
            if step == t.start:
                self._phases.enter("compile")
            idle = t.state.step.is_ready()
            with self._waiting():  # on CPU the call may return when the step is done
                t.state, values = t.step(t.state, arrays, t.fixed)
            self._phases.enter("step")
            step += 1
            self._step = step
            self._stragglers.lap(step, idle)
            self._progress.step()
            self._profiler.step(step)
            if self._profiler.ends(step):
                self._end_profile(arrays)
            if self._roof is None:
                self._find_roof()
            self._flush(step)
            # By the step alone: a run that was interrupted has the rows of one that was not.
            if step % config.log_every == 0 or step in (1, t.total):
                self._pending = _Pending(step, values)
        if step > t.start:
            self._end_profile(arrays)
        return self._finish(step, None if early else stop)

    def _next(self, batches: Iterator) -> Any:
        """The next batch; the wait for it counts if the device had nothing to do meanwhile."""
        self._phases.enter("data_wait")
        _, batch = next(batches)
        idle = self._training.state.step.is_ready()
        self._phases.enter("step", counts_as="data_wait" if idle else "step")
        return batch

    def _data_wait(self) -> float:
        """Its share of the time since it was asked for last."""
        before, self._before = self._before, self._phases.totals()
        seconds = {name: x - before[name] for name, x in self._before.items()}
        return seconds["data_wait"] / (sum(seconds.values()) or 1.0)

    def _pause(self) -> None:
        """Stops the clock of the steps once those that were dispatched are done: they count."""
        with self._waiting():
            jax.block_until_ready(self._training.state)
        self._stopwatch.pause()

    def _find_roof(self) -> None:
        """Learns what the devices can do: on CPU by a measurement, so nothing else may run."""
        t = self._training
        self._pause()
        # Process 0 has the use of it; the others of its host wait in the next step meanwhile.
        with self._phases.during("start"), self._waiting():
            if peers().is_first:
                self._roof = roof_of(t.mesh, t.config.model.dtype, t.cache_dir, peers().num_hosts)
                add_to_session(t.workdir / layout.RECEIPT, {"peak": self._roof.to_dict()})
            else:
                self._roof = NO_ROOF
        self._stopwatch.resume()

    def _end_profile(self, arrays: Any) -> None:
        """Writes the profile's table, if one is under way; `arrays` are a batch of the step."""
        t = self._training
        self._pause()
        self._profiler.end(lambda: t.lower(t.state, arrays, t.fixed).compile().as_text())
        self._stopwatch.resume()

    def _flush(self, dispatched: int) -> None:
        """Reads the metrics of a step when the next one is under way, and writes their row."""
        if self._pending is None:
            return
        t, step = self._training, self._pending.step
        with self._waiting():
            values = jax.device_get(self._pending.values)
        values = {name: float(x) for name, x in values.items()}
        self._pending = None
        first_nonfinite, skipped = int(values.pop("first_nonfinite")), int(values.pop("skipped"))
        # The optimizer counts the updates that were made.
        with self._waiting():  # on CPU it is computed behind the step that is under way
            learning_rate = float(t.learning_rate(max(0, step - 1 - skipped)))
        # The step that is under way may be done already: on CPU small ones are when they begin.
        seconds, steps = self._stopwatch.lap(dispatched if t.state.step.is_ready() else step)
        row = {f"train/{name}": value for name, value in values.items() if name != "num_targets"}
        row["train/learning_rate"] = learning_rate
        row["train/tokens"] = step * t.clock.tokens_per_step
        if t.config.train.on_nonfinite == "skip":
            row["train/skipped"] = skipped
        if not self._timed:  # it holds the compilation
            row["perf/first_steps_seconds"] = seconds
            self._timed = True
        elif steps:  # else the last step was done with the one before: their rate is one
            self._rate = steps * t.clock.tokens_per_step / seconds
        if self._rate is not None:
            row |= speed_row(self._rate, t.flops_per_token, self._roof)
        row["perf/data_wait"] = self._data_wait()
        self._write(step, row)
        self._events.write(step)
        if first_nonfinite >= 0:
            raise nonfinite_error(t, first_nonfinite)
        rate, mfu = row.get("perf/tokens_per_sec"), row.get("perf/mfu")
        self._progress.row(step, values["loss"], rate, mfu)

    def _evaluate(self, step: int) -> None:
        self._flush(step)
        self._pause()
        t = self._training
        whole = step == t.total and not self._by_metric
        with self._phases.during("evaluate"), self._waiting():
            row, lines = self._evaluations.run(step, t.params(), whole=whole)
        self._events.write(step)
        metric = t.config.train.metric
        if self._by_metric and f"eval/{metric}" not in row:
            measured = ", ".join(name.removeprefix("eval/") for name in row)
            raise ValueError(f"train.metric: {metric!r} is not measured; there is {measured}")
        self._write(step, {**row, "eval/tokens": step * t.clock.tokens_per_step})
        for line in lines:
            self._progress.line(line)
        self._stopwatch.resume()

    def _is_enough(self) -> bool:
        """Whether the metric has not become better for as long as the config's patience."""
        config = self._training.config.train
        mode = best.metric_mode(config.metric, config.metric_mode)

        def is_enough() -> bool:
            rows = metrics.read_rows(self._training.workdir / layout.METRICS)
            return best.should_stop(rows, config.metric, mode, config.patience)

        return peers().from_first("whether to stop early", is_enough)

    def _save(self, step: int) -> None:
        self._flush(step)
        self._pause()
        with self._waiting():
            peers().arrive(f"before saving step {step}")
        t = self._training
        first_nonfinite = int(t.state.flags["first_nonfinite"])
        if first_nonfinite >= 0:
            raise nonfinite_error(t, first_nonfinite)
        with self._phases.during("save_wait"), self._waiting():
            # Rows up to here are on disk before the checkpoint that would go on from here.
            t.checkpoints.save(step, t.state, t.metadata, self._best_steps(), self._log.sync)
        self._events.write(step)
        self._stopwatch.resume()

    def _best_steps(self) -> list[int]:
        t = self._training
        config = t.config.train
        if not config.keep_best:
            return []
        mode = best.metric_mode(config.metric, config.metric_mode)

        def best_steps() -> list[int]:
            rows = metrics.read_rows(t.workdir / layout.METRICS)
            return best.best_steps(rows, config.metric, mode, config.keep_best)

        return peers().from_first("the best steps", best_steps)

    def _finish(self, step: int, signal_name: str | None) -> int:
        t = self._training
        self._phases.enter("save_wait")
        if not t.checkpoints.settle():
            self._save(step)  # once more: a run should not end without its last step
        t.checkpoints.wait()
        self._phases.enter("step")  # the little that is left
        if peers().is_first:
            rows = metrics.read_rows(t.workdir / layout.METRICS)
            draw_loss_curve(rows, t.workdir / layout.LOSS_CURVE, title=t.workdir.name)
        if step == t.total or not signal_name:
            early = "" if step == t.total else f" of {t.total}: no better {t.config.train.metric}"
            self._events.write(step)
            if peers().is_first:
                self._progress.line(f"time:  {in_words(goodput(t.workdir))}")
            self._progress.line(f"finished {step} steps{early}: {t.workdir}")
            return FINISHED
        saved = f"saved step {step}" if t.checkpoints.steps() else "no step was taken yet"
        self._progress.line(f"{signal_name}: {saved}; the same command continues")
        return INTERRUPTED

    def _write(self, step: int, values: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as closing:  # whatever one of them raises, all are closed
            for part in (self._progress, self._evaluations, *self._sinks, self._profiler):
                closing.callback(part.close)  # called from the last to the first


def _sinks(training: Training, resume: int | None) -> list[Any]:
    """What takes the rows: metrics.jsonl first."""
    t, config = training, training.config.train
    sinks: list[Any] = [metrics.MetricsLog(t.workdir / layout.METRICS, resume)]
    if config.tensorboard:
        sinks.append(metrics.TensorBoard(t.workdir / layout.EVENTS, resume))
    if config.wandb:
        values = t.config.to_dict()
        sinks.append(metrics.WeightsAndBiases(config.wandb, t.identity, values))
    return sinks
