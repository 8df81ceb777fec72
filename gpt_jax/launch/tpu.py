"""A launch on Cloud TPU: asks for the slices, sets them up, follows the run, and gives all back."""

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpt_jax.launch.gcloud import ABSENT, ACTIVE, CloudError, Queue, run
from gpt_jax.launch.group import FAILED, FINISHED, INTERRUPTED, USER_MISTAKE
from gpt_jax.launch.hosts import Hosts
from gpt_jax.launch.job import Job
from gpt_jax.launch.record import Record, held, load, log_path

_MOST_CRASHES = 3  # starts in a row that come no further
_MOST_TAKEN = 10  # times in a row that the slices are taken away before anything is saved
_MOST_SILENT = 20  # looks without an answer, after which a host counts as gone
_MOST_WAITED = 20  # looks at hosts that still run, or are silent, when the first has ended
_MOST_TRIES = 20  # of a question to the cloud: the network may be away for a while
_GRACE = 4  # looks after a run that was interrupted: its machine may be about to go
_MOST_ASKED = 5  # times whether a job that ran still runs
_TAKEN = None
_RUNNING, _SILENT = "running", "no answer"  # states of the record


def up(
    record: Record,
    job: Job,
    archive: pathlib.Path,
    hosts: Hosts,
    folder: pathlib.Path,
    *,
    keep: bool = False,
    poll: float = 15.0,
    say: Callable[[str], None] = print,
) -> int:
    """Runs a job on slices that are asked for here, or follows it where it runs already.

    The slices are given back when the job has ended, whatever its end, and when they cannot be set
    up. Only Ctrl-C while the job runs leaves it, and them, to themselves.

    Args:
      record: Of the launch; kept up to date in `folder`.
      job: What the hosts run.
      archive: Of the code and the job.
      hosts: Of record.target.
      folder: Of records.
      keep: Nothing is given back.
      poll: Seconds between looks.
      say: Takes the lines for people.

    Returns:
      FINISHED; USER_MISTAKE: the run refused its config; INTERRUPTED: stopped by `max_cost` or
      `launch stop`, or left to itself; FAILED: a crash loop, a run that halted, or slices that
      could not be had or set up.

    Raises:
      ValueError: Another `up` is at this launch, or the hosts run another job.
    """
    name = record.target.name
    with held(folder, name), _signals_interrupt():
        (folder / f"{name}.stop").unlink(missing_ok=True)
        return _Up(record, job, archive, hosts, folder, keep, poll, say).run()


class _Up:
    def __init__(self, record, job, archive, hosts, folder, keep, poll, say):
        self._record, self._job, self._archive, self._hosts = record, job, archive, hosts
        self._folder, self._keep, self._poll, self._say = folder, keep, poll, say
        self._queue, self._name = Queue(record.target), record.target.name
        self._following = False  # the job runs: it goes on without us
        self._ours = False  # nobody else would give the slices back
        self._progress = 0
        self._crashes, self._grace, self._waited = 0, 0, 0

    def run(self) -> int:
        try:
            code = self._lives()
        except (CloudError, KeyboardInterrupt) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._say(f"launch: {'interrupted' if interrupted else error}")
            code = INTERRUPTED if interrupted else FAILED
            if self._following or not self._ours:
                self._say(
                    "launch: if it runs it goes on, and costs; the same command follows it again, "
                    f"`gpt-jax launch stop --name={self._name}` ends it"
                )
                return code
        except BaseException:
            # What we have asked for, nobody else would give back.
            if self._ours and not self._following:
                self._give_back()
            raise
        if not self._following:
            self._give_back()
        self._record.code_of_end = code
        self._save()
        return code

    def _lives(self) -> int:
        """From one asking for slices to the next, until the job has ended: its code."""
        taken_in_vain = 0
        while True:
            fresh = self._acquire()
            if not self._is_set_up(fresh):
                self._ours = True
                self._say(f"launch: sets up {self._record.target.num_hosts} hosts")
                self._tell("set up")
                self._hosts.set_up(self._job, self._archive, lambda: _wait(self._poll))
                self._record.starts += 1
                self._record.log_offset = 0
            self._following, before = True, self._progress
            code = self._follow()
            if code == INTERRUPTED and self._is_to_stop():
                return code  # `launch stop` lets the run save, and deletes
            self._following = False
            if code is not _TAKEN:
                return code
            self._record.preemptions += 1
            taken_in_vain = 0 if self._progress > before else taken_in_vain + 1
            if taken_in_vain >= _MOST_TAKEN:
                self._say(f"launch: taken away {taken_in_vain} times before anything was saved")
                return FAILED
            self._say("launch: the slices were taken away; they are asked for again")
            self._ours = True
            self._queue.deleted()

    def _acquire(self) -> bool:
        """Returns when the slices are there; whether they were not at first."""
        told = ""
        while True:
            state, reason = self._state()
            if state == ACTIVE:
                return bool(told)
            if self._is_to_stop():
                self._ours = True
                raise KeyboardInterrupt
            if state == ABSENT:
                self._tell("asked for")
                self._ours = True
                try:
                    run(self._queue.create())
                except CloudError as error:
                    if error.kind != "exists":
                        raise
            elif state == "FAILED":
                self._ours = True
                raise CloudError("the request failed", reason)
            elif state == "SUSPENDED":
                self._queue.deleted()
            if state != told:
                told = state
                self._tell(f"in the queue: {state}")
                if state != ABSENT:
                    self._ours = True
                    self._say(f"launch: {state}")
            if state not in (ABSENT, "SUSPENDED"):
                _wait(self._poll)

    def _is_set_up(self, fresh: bool) -> bool:
        """Whether the hosts are at this job already."""
        if fresh or not self._record.active:
            self._record.begin_active(time.time())
        self._record.still_active(time.time())
        before = load(self._folder, self._name)
        ran = before is not None and before.state in (_RUNNING, _SILENT)
        report = None
        for _ in range(0 if fresh else _MOST_ASKED if ran else 1):
            report = report or self._hosts.look(self._record.log_offset)
        if report is None and ran and not fresh:
            # To set up hosts anew would end what runs there.
            raise CloudError(self._name, "its hosts do not answer, and ran a job")
        if report is None or report["state"] == "none":
            return False
        if report["job"] != self._job.id:
            raise ValueError(
                f"--name: {self._name!r} runs another job, of other code or config; "
                f"`gpt-jax launch stop --name={self._name}` ends it"
            )
        self._say("launch: the job runs already; it is followed")
        return True

    def _follow(self) -> int | None:
        """Until the job has ended: its code; _TAKEN: the slices are gone."""
        silent, self._grace, self._waited = 0, 0, 0
        self._tell(_RUNNING)
        while True:
            if self._is_to_stop():
                self._say("launch: ended by `launch stop`")
                return INTERRUPTED
            state, _ = self._state()
            if state != ACTIVE:
                self._tell(f"taken away: {state}")
                return INTERRUPTED if self._is_to_stop() else _TAKEN
            self._record.still_active(time.time())
            report = self._hosts.look(self._record.log_offset)
            silent = 0 if report else silent + 1
            if silent >= _MOST_SILENT:
                self._tell(_SILENT)
                self._say(f"launch: no answer from the first host {silent} times in a row")
                return _TAKEN
            if report:
                self._show(report)
                if report["state"] != "running" and (code := self._ended(report)) is not None:
                    return code
            self._save()
            if self._is_over_budget():
                self._hosts.ask_to_stop()
                if report := self._hosts.look(self._record.log_offset):
                    self._show(report)
                return INTERRUPTED
            _wait(self._poll)

    def _show(self, report: dict[str, Any]) -> None:
        if report["log"]:
            print(report["log"], end="", flush=True)
            with open(log_path(self._folder, self._name), "a") as file:
                file.write(report["log"])
        self._record.log_offset = report["offset"]
        self._record.row = report["row"] or self._record.row
        if report["progress"] > self._progress:
            self._progress, self._crashes = report["progress"], 0

    def _ended(self, first: dict[str, Any]) -> int | None:
        """The code, if that is the end; None: the job was started again, or is waited for."""
        reports = self._hosts.look_at_all()
        ended = [report for report in reports if report["state"] != "running"]
        if (not ended or len(ended) < len(reports)) and self._waited < _MOST_WAITED:
            self._waited += 1
            return None
        # One that does not answer leaves us none of all: then the first host's word counts.
        ended = ended or [first]
        codes = [report["code"] for report in ended]
        if USER_MISTAKE in codes:
            self._say("launch: the run refuses its config; another start would not help")
            return USER_MISTAKE
        if all(code == FINISHED for code in codes):
            self._tell("finished")
            return FINISHED
        if any(report["halted"] for report in ended):
            self._say("launch: the run halted for a loss that is not finite, or a spike")
            return FAILED
        if all(code in (FINISHED, INTERRUPTED) for code in codes) and self._grace < _GRACE:
            self._grace += 1
            return None
        self._crashes, self._grace, self._waited = self._crashes + 1, 0, 0
        if self._crashes >= _MOST_CRASHES:
            self._say(f"launch: crash loop: {self._crashes} starts in a row came no further")
            return FAILED
        self._say(f"launch: the job ended with exit codes {codes}; it is started again")
        with contextlib.suppress(CloudError):  # the next look tells
            self._hosts.start_again()
            self._record.starts += 1
        return None

    def _state(self) -> tuple[str, str]:
        for left in reversed(range(_MOST_TRIES)):
            try:
                return self._queue.state()
            except CloudError as error:
                if not left or error.kind in ("denied", "invalid"):
                    raise
                if left == _MOST_TRIES - 1:
                    self._say(f"launch: {error}; it is tried again")
                _wait(self._poll)
        raise AssertionError

    def _is_over_budget(self) -> bool:
        most, cost = self._record.target.max_cost, self._record.cost
        if most is None or cost is None or cost < most:
            return False
        self._say(f"launch: it has cost {cost:.2f}, --max_cost is {most:g}; the run is to save")
        return True

    def _is_to_stop(self) -> bool:
        return (self._folder / f"{self._name}.stop").exists()

    def _give_back(self) -> None:
        if self._keep:
            self._say(f"launch: {self._name} is kept, and costs until `gpt-jax launch stop`")
            return
        try:
            give_back(self._queue, self._poll)
        except (CloudError, KeyboardInterrupt) as error:
            why = str(error) or "interrupted"
            self._say(f"launch: NOT deleted, it may go on to cost: {why}")
            self._tell("NOT deleted")
            return
        self._say("launch: deleted")
        self._tell("deleted")

    def _tell(self, state: str) -> None:
        self._record.state = state
        self._save()

    def _save(self) -> None:
        self._record.save(self._folder)


def give_back(queue: Queue, poll: float) -> None:
    """Deletes a queued resource; tries it some times.

    Raises:
      CloudError: It is still there.
    """
    for left in (2, 1, 0):
        try:
            return queue.deleted()
        except CloudError:
            if not left:
                raise
            _wait(poll)


def _wait(seconds: float) -> None:
    time.sleep(seconds)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """What would end us ends us as Ctrl-C does, so that nothing is left behind."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
