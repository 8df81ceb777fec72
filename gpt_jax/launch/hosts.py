"""The hosts of a launch: what they are sent, told and asked, through `gcloud ... ssh`."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gpt_jax.launch.gcloud import Call, CloudError, Queue, remote, run
from gpt_jax.launch.host import MARK
from gpt_jax.launch.job import Job
from gpt_jax.launch.target import MOUNTS, Target

_TRIES = 6  # of the first command: a machine that has just come up does not listen yet
# Seconds that a command may take.
_SHORT, _TO_SET_UP, _TO_STOP = 180, 2400, 300


class Hosts:
    """All hosts of a target.

    They keep what is theirs in one folder of their home: `code/`, `venv/`, `job.json`, `log`, and
    `env`, which only its owner can read.
    """

    def __init__(self, target: Target, secrets: Mapping[str, str], mounts: str = MOUNTS):
        self._target, self._queue, self._mounts = target, Queue(target), mounts
        self._secrets = dict(secrets)
        self._folder = f"gpt-jax/{target.name}"

    def archive_name(self) -> str:
        """Of the file that is copied to them."""
        return f"gpt-jax-{self._target.name}.tar.gz"

    def prepare(self, job: Job) -> Call:
        """Unpacks the archive and sets the host up."""
        setup = f"{self._folder}/code/gpt_jax/launch/host_setup.sh"
        text = remote(
            ["rm", "-rf", self._folder],
            ["mkdir", "-p", self._folder],
            ["tar", "-xzf", self.archive_name(), "-C", self._folder],
            ["rm", self.archive_name()],
            ["bash", setup, "tpu", self._mounts, *job.buckets],
        )
        return self._queue.ssh(text)

    def send_secrets(self, node: int, worker: int) -> Call:
        """Writes `env` of one host; the values go through stdin alone."""
        text = f"umask 077 && cat > {self._folder}/env"
        masked = " ".join(f"{name}=***" for name in self._secrets)
        stdin = json.dumps(self._secrets)
        return self._queue.ssh(text, node=node, worker=worker, stdin=stdin, masked=masked)

    def start(self, *, again: bool = False) -> Call:
        """Starts the job on all of them; `again`: what is left of it is stopped before."""
        return self._queue.ssh(self._python("restart" if again else "start"))

    def stop(self) -> Call:
        """Asks the job to save and end, on all of them."""
        return self._queue.ssh(self._python("stop"))

    def status(self, offset: int, worker: int = 0) -> Call:
        """Asks one of the first slice how far it is, with its log from `offset` on."""
        return self._queue.ssh(self._python("status", f"--log={offset}"), node=0, worker=worker)

    def status_of_all(self) -> Call:
        """Asks all of them how far they are."""
        return self._queue.ssh(self._python("status"))

    def _python(self, command: str, *words: str) -> str:
        host = ["../venv/bin/python", "-m", "gpt_jax.launch.host", command, "..", *words]
        return remote(["cd", f"{self._folder}/code"], host)

    def set_up(self, job: Job, archive: pathlib.Path, sleep: Callable[[], None]) -> None:
        """Ships the code, installs it, sends the secrets and starts the job.

        Raises:
          CloudError: One of the steps failed.
        """
        for left in reversed(range(_TRIES)):
            try:
                run(self._queue.copy(str(archive)), _TO_SET_UP)
                break
            except CloudError:
                if not left:
                    raise
                sleep()
        run(self.prepare(job), _TO_SET_UP)
        if self._secrets:
            for node in range(self._target.slices):
                for worker in range(self._queue.num_workers(node)):
                    run(self.send_secrets(node, worker), _SHORT)
        run(self.start(), _SHORT)

    def start_again(self) -> None:
        """Starts the job anew on all of them.

        Raises:
          CloudError: One of them cannot be reached.
        """
        run(self.start(again=True), _TO_STOP)

    def look(self, offset: int, worker: int = 0) -> dict[str, Any] | None:
        """What launch.host.status says on one of the first slice; None: no answer."""
        try:
            reports = _reports(run(self.status(offset, worker), _SHORT))
        except CloudError:
            return None
        return reports[0] if reports else None

    def look_at_all(self) -> list[dict[str, Any]]:
        """The same of all that answer, without their logs."""
        try:
            return _reports(run(self.status_of_all(), _SHORT))
        except CloudError:
            return []

    def ask_to_stop(self) -> None:
        """Has the job save and end, if the hosts can be reached."""
        try:
            run(self.stop(), _TO_STOP)
        except CloudError:
            return


def _reports(printed: str) -> list[dict[str, Any]]:
    reports = []
    for line in printed.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            reports.append(json.loads(text))
    return reports
