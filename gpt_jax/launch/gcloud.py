"""Queued resources of Cloud TPU through the `gcloud` program.  Starts no JAX.

Commands are lists of words, never text for a shell. What runs on a host is text for a shell there:
it is made of names that were checked and of quoted words (`remote`).
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from gpt_jax.launch.target import Target

# States of a queued resource; cloud.google.com/tpu/docs/queued-resources.
ACTIVE, ABSENT = "ACTIVE", "ABSENT"
_TPUS = ["gcloud", "compute", "tpus"]
_QUEUE = [*_TPUS, "queued-resources"]
# What gcloud's messages say, and what it means; the first that is found counts.
_KINDS = {
    "NOT_FOUND": "absent",
    "ALREADY_EXISTS": "exists",
    "Quota": "quota",
    "RESOURCE_EXHAUSTED": "quota",
    "PERMISSION_DENIED": "denied",
    "gcloud auth login": "denied",
    "INVALID_ARGUMENT": "invalid",
}


class CloudError(RuntimeError):
    """A command of gcloud failed.

    Attributes:
      kind: "absent", "exists", "quota", "denied", "invalid" or "other".
    """

    def __init__(self, what: str, message: str):
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        # gcloud's own word, which advice may follow; else the last of what was printed.
        said = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        super().__init__(f"{what}: {said[0] if said else 'no reason given'}")
        self.kind = next((kind for word, kind in _KINDS.items() if word in message), "other")


@dataclasses.dataclass(frozen=True)
class Call:
    """One command.

    Attributes:
      words: Of the command.
      stdin: What it reads; shown masked.
      masked: What is shown in the place of stdin.
    """

    words: tuple[str, ...]
    stdin: str = ""
    masked: str = ""

    def __str__(self):
        return shlex.join(self.words) + (f"  < {self.masked}" if self.masked else "")


def remote(*commands: Sequence[str]) -> str:
    """Text for the shell of a host: the commands, each after the one before has succeeded."""
    return " && ".join(shlex.join(command) for command in commands)


class Queue:
    """The queued resource of a target: its commands, and what running them says."""

    def __init__(self, target: Target):
        self._target = target
        self._where = (f"--zone={target.zone}", f"--project={target.project}", "--quiet")

    def create(self) -> Call:
        """Asks for the slices."""
        target = self._target
        words = [*_QUEUE, "create", target.name, *self._where]
        words += [f"--accelerator-type={target.accelerator_type}"]
        words += [f"--runtime-version={target.generation.runtime}"]
        if target.slices == 1:
            words += [f"--node-id={target.name}"]
        else:
            words += [f"--node-count={target.slices}", f"--node-prefix={target.name}"]
        words += ["--spot"] if target.spot else []
        words += ["--reserved"] if target.reserved else []
        if target.max_wait is not None:
            words += [f"--valid-until-duration={round(target.max_wait * 3600)}s"]
        return Call(tuple(words))

    def describe(self) -> Call:
        """Asks for the state."""
        words = [*_QUEUE, "describe", self._target.name, *self._where, "--format=json"]
        return Call(tuple(words))

    def describe_slice(self, number: int) -> Call:
        """Asks for what a slice consists of."""
        name = self._target.name
        node = name if self._target.slices == 1 else f"{name}-{number}"
        return Call((*_TPUS, "tpu-vm", "describe", node, *self._where, "--format=json"))

    def delete(self) -> Call:
        """Gives everything back, also slices that are there."""
        return Call((*_QUEUE, "delete", self._target.name, *self._where, "--force"))

    def copy(self, path: str) -> Call:
        """Copies a file into the home folder of all hosts."""
        everywhere = ("--worker=all", "--node=all")
        words = (*_QUEUE, "scp", path, f"{self._target.name}:", *everywhere, *self._where)
        return Call(words)

    def ssh(
        self,
        command: str,
        *,
        node: int | None = None,
        worker: int | None = None,
        stdin: str = "",
        masked: str = "",
    ) -> Call:
        """Runs text for a shell on a host; None: on all.

        What is read from stdin is for one host: several would share it.
        """
        assert not stdin or None not in (node, worker)
        words = [*_QUEUE, "ssh", self._target.name]
        words += [f"--worker={'all' if worker is None else worker}"]
        words += [f"--node={'all' if node is None else node}", *self._where]
        return Call((*words, f"--command={command}"), stdin, masked)

    def state(self) -> tuple[str, str]:
        """The state now, and what the cloud says of it.

        Raises:
          CloudError: It cannot be had.
        """
        try:
            described = json.loads(run(self.describe()) or "{}")
        except CloudError as error:
            if error.kind == "absent":
                return ABSENT, ""
            raise
        state: dict[str, Any] = described.get("state") or {}
        error = (state.get("failedData") or {}).get("error") or {}
        return state.get("state", "STATE_UNSPECIFIED"), str(error.get("message", ""))

    def num_workers(self, number: int) -> int:
        """Hosts of a slice that is there."""
        described = json.loads(run(self.describe_slice(number)) or "{}")
        return len(described.get("networkEndpoints") or [None] * self._target.hosts_per_slice)

    def deleted(self) -> None:
        """Deletes it; that it is not there is no error."""
        try:
            run(self.delete())
        except CloudError as error:
            if error.kind != "absent":
                raise


def run(call: Call, timeout: float | None = None) -> str:
    """Runs a command to its end: what it printed.

    Raises:
      CloudError: It failed, or took longer than `timeout` seconds.
      ValueError: gcloud is not installed.
    """
    what = " ".join(word for word in call.words[:6] if not word.startswith("-"))
    try:
        process = subprocess.Popen(
            call.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise ValueError(
            "gcloud: is not on the PATH; install it by cloud.google.com/sdk/docs/install"
        ) from None
    try:
        output, errors = process.communicate(call.stdin, timeout)
    except subprocess.TimeoutExpired:
        raise CloudError(what, f"no answer within {timeout:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # ssh too, which gcloud has started
            process.wait()
    if process.returncode:
        raise CloudError(what, errors or output)
    return output
