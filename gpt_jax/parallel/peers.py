"""What the processes of a run tell each other besides arrays: small values by key, and waits that
say who is late.

All of it goes through the key-value store of JAX's coordination service, which process 0 holds, so
that it works before the first computation and while the devices hang.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_SLICE = 0.5  # seconds between two looks at whether something has gone wrong
_QUICK = 0.005  # the first of the looks at who has come


class LateError(RuntimeError):
    """Processes did not come to where the others wait for them, or have ended.

    Attributes:
      code: The exit code of this process: that of the one that has ended.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Store(Protocol):
    """The part of jaxlib's DistributedRuntimeClient that is used."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def key_value_delete(self, key: str) -> None: ...


class Peers:
    """The processes of a run, seen from one of them.

    The main thread of every process makes the same calls of `arrive`, `exchange`, `from_first` and
    `host_first` in the same order. A thread of its own says every few seconds that the process
    lives, and where it is.

    Args:
      store: Of the coordination service; None: the process is alone, and nothing waits.
      index: Which process this is.
      host: The name of its machine.
      count: How many processes there are.
      timeout: Seconds that `exchange` waits for the others.
      beat: Seconds between two signs of life.
      say: Takes lines for people.
    """

    def __init__(
        self,
        store: Store | None = None,
        index: int = 0,
        host: str = "",
        count: int = 1,
        *,
        timeout: float = 1800.0,
        beat: float = 5.0,
        say: Callable[[str], None] = print,
    ):
        self.index, self.count, self._store = index, count, store
        self._timeout, self._beat, self._say = timeout, beat, say
        self._number = 0  # of the calls so far
        self._where: Callable[[], str] = lambda: "phase 'start'"
        self._closed = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # last sign of life, and when it was new
        self.hosts = [host]
        self._thread = threading.Thread(target=self._live, name="sign-of-life", daemon=True)
        if store is not None:
            self._thread.start()
            self.hosts = self.exchange("all processes are there", host)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    @property
    def is_first_of_host(self) -> bool:
        """Whether it is the one that prepares what a machine needs once."""
        return self.hosts.index(self.hosts[self.index]) == self.index

    @property
    def num_hosts(self) -> int:
        """Machines."""
        return len(set(self.hosts))

    def tell_where(self, where: Callable[[], str]) -> None:
        """Sets what the others are told of where this process is; it is called from a thread."""
        self._where = where

    def arrive(self, name: str) -> None:
        """Returns when all processes have come here.

        Raises:
          LateError: They have not within the timeout, or one has ended; names them, their hosts
            and where they were last.
        """
        self.exchange(name, None)

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives in process 0, a JSON value, in all of them."""
        return self.exchange(name, make() if self.is_first else None)[0]

    def host_first(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives; one process of each host makes it before the others do."""
        if self.is_first_of_host:
            value = make()
            self.arrive(name)
            return value
        self.arrive(name)
        return make()

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order, when all have come; as `arrive`."""
        if self._store is None:
            return [value]
        here, self._number = f"meet/{self._number}", self._number + 1
        self._store.key_value_set(f"{here}/at/{self.index}", json.dumps([name, value]))
        self._post_where(f"barrier {name!r}")
        since, told = time.monotonic(), 0.0
        while True:
            values = self._gather(here, name) if self.is_first else self._gathered(here)
            if values is not None:
                return values
            waited = time.monotonic() - since
            self._raise_failure(name)
            if waited > self._timeout:
                raise LateError(f"barrier {name!r}: waited {waited:.1f} s for {self._late(here)}")
            if waited - told > 60:
                told = waited
                self._say(f"barrier {name!r}: waiting since {waited:.0f} s for {self._late(here)}")

    def _gather(self, here: str, name: str) -> list[Any] | None:
        """Process 0: the values once all are there, and tells the others; None after a while."""
        deadline, pause = time.monotonic() + _SLICE, _QUICK
        while time.monotonic() < deadline:
            found = self._by_process(f"{here}/at/")
            if len(found) == self.count:
                entries = [json.loads(found[i]) for i in range(self.count)]
                names = {entry[0] for entry in entries}
                assert names == {name}, f"processes wait at different places: {sorted(names)}"
                self._store.key_value_set(f"{here}/all", json.dumps([x[1] for x in entries]))
                if self._number > 1:  # all have come here, so all have left there
                    self._store.key_value_delete(f"meet/{self._number - 2}/")
                return [entry[1] for entry in entries]
            time.sleep(pause)
            pause = min(2 * pause, _SLICE)
        return None

    def _gathered(self, here: str) -> list[Any] | None:
        """The others: what process 0 has gathered; None after a while."""
        try:
            found = self._store.blocking_key_value_get(f"{here}/all", int(1000 * _SLICE))
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LateError(
                    f"{self.name(0)} does not answer, which holds the coordination service: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            return None
        return json.loads(found)

    def fail(self, message: str, code: int) -> None:
        """Tells the others that this process ends, and how; they stop waiting for it."""
        if self._store is not None:
            with contextlib.suppress(Exception):  # the coordinator may be gone
                entry = json.dumps([message[:2000], code])
                self._store.key_value_set(f"failed/{self.index}", entry)

    def failures(self) -> dict[int, tuple[str, int]]:
        """(message, exit code) of the processes that have ended with `fail`."""
        found = self._by_process("failed/") if self._store is not None else {}
        return {i: tuple(json.loads(text)) for i, text in found.items()}

    def lost(self, seconds: float) -> list[int]:
        """Processes that give no sign of life for so long, and did not say that they end."""
        if self._store is None:
            return []
        since = time.monotonic()
        self._look()
        alive: set[int] = {self.index}
        first = {i: beat for i, (beat, _) in self._seen.items()}
        while len(alive) < self.count and time.monotonic() - since < seconds:
            time.sleep(min(_SLICE, self._beat / 2))
            self._look()
            alive |= {i for i, (beat, _) in self._seen.items() if beat != first.get(i)}
            try:
                alive |= set(self.failures())
            except Exception:
                return [0]  # it holds the service
        return [i for i in range(self.count) if i not in alive]

    def why(self, error: BaseException) -> LateError | None:
        """What another process has to do with an error here; None: nothing that is known.

        A computation breaks off where a process that takes part in it is gone.
        """
        if isinstance(error, LateError):
            return error
        lost = self.lost(3 * self._beat)
        first_line = (str(error).splitlines() or [""])[0][:200]
        if lost:
            return LateError(f"lost {self.describe(lost)} ({first_line})")
        with contextlib.suppress(Exception):
            for process, (message, code) in self.failures().items():
                if process != self.index:
                    told = f"{self.name(process)} has ended: {message} ({first_line})"
                    return LateError(told, code)
        return None

    def name(self, process: int) -> str:
        """ "process 3 on HOST", as far as that is known."""
        known = len(self.hosts) == self.count
        return f"process {process} on {self.hosts[process]}" if known else f"process {process}"

    def describe(self, processes: Sequence[int]) -> str:
        """Their names, and where they said last that they were."""
        self._look()
        words = []
        for i in processes:
            beat, since = self._seen.get(i, ("", 0.0))
            if not beat:
                words.append(f"{self.name(i)}, which was never heard of")
                continue
            where = json.loads(beat)
            silent = time.monotonic() - since
            quiet = f", silent for {silent:.0f} s" if silent > 3 * self._beat else ""
            words.append(f"process {i} on {where['host']}, last in {where['where']}{quiet}")
        return "; ".join(words)

    def close(self) -> None:
        """Ends the thread; the service is still there."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def post(self, key: str, value: str) -> bool:
        """Sets a key once; whether it was not set before."""
        assert self._store is not None
        try:
            self._store.key_value_set(key, value)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return False
        return True

    def posted(self, folder: str) -> dict[int, str]:
        """What the processes have posted under `folder/<process>`."""
        return self._by_process(f"{folder}/")

    def forget(self, folder: str) -> None:
        """Removes what was posted there."""
        assert self._store is not None
        self._store.key_value_delete(f"{folder}/")

    def wait_for(self, key: str, seconds: float) -> str | None:
        """The value of a key as soon as it is there; None: it is not, or nobody answers."""
        assert self._store is not None
        try:
            return self._store.blocking_key_value_get(key, max(1, int(1000 * seconds)))
        except Exception:
            return None

    def _late(self, here: str) -> str:
        there = self._by_process(f"{here}/at/")
        return self.describe([i for i in range(self.count) if i not in there]) or self.name(0)

    def _raise_failure(self, name: str) -> None:
        failed = self.failures()
        if failed:
            i, (message, code) = next(iter(failed.items()))
            raise LateError(f"barrier {name!r}: {self.name(i)} has ended: {message}", code)

    def _by_process(self, folder: str) -> dict[int, str]:
        assert self._store is not None
        found = self._store.key_value_dir_get(folder)
        return {int(key.rsplit("/", 1)[1]): value for key, value in sorted(found)}

    def _live(self) -> None:
        while not self._closed.wait(self._beat):
            self._post_where(self._where())

    def _post_where(self, where: str) -> None:
        # The time makes it new; clocks of hosts are not compared.
        beat = {"where": where, "host": self.hosts[0] if len(self.hosts) == 1 else
                self.hosts[self.index], "beat": time.monotonic()}  # fmt: skip
        with contextlib.suppress(Exception):  # who waits for us will be told in other ways
            self._store.key_value_set(f"where/{self.index}", json.dumps(beat), allow_overwrite=True)

    def _look(self) -> None:
        now = time.monotonic()
        with contextlib.suppress(Exception):
            for i, beat in self._by_process("where/").items():
                if beat != self._seen.get(i, ("", 0.0))[0]:
                    self._seen[i] = (beat, now)
