"""Which processes train a run together, as the command line says it.  Starts no JAX."""

import dataclasses
import re

_ADDRESS = re.compile(r"(\[[\da-fA-F:]+\]|[^:\s/]+):\d+")


@dataclasses.dataclass(frozen=True)
class Processes:
    """How a process finds the others.

    Attributes:
      auto: What is not given is asked of the cluster: TPU pods, SLURM, Kubernetes, Open MPI.
      coordinator: "HOST:PORT" of process 0, which listens there; "": not given.
      num_processes: How many there are; 0: not given.
      process_id: Which this is, from 0; -1: not given.
      heartbeat_timeout: Seconds without a sign of life after which a process is lost: the runtime
        then ends the others.
      barrier_timeout: Seconds that processes wait for each other where all must come.

    Raises:
      ValueError: They do not fit together.
    """

    auto: bool = False
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    heartbeat_timeout: int = 100
    barrier_timeout: float = 1800.0

    def __post_init__(self):
        for name, least in (("heartbeat_timeout", 1), ("barrier_timeout", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: {getattr(self, name)} is not at least {least} second")
        if self.coordinator and not _ADDRESS.fullmatch(self.coordinator):
            raise ValueError(
                f"--coordinator: {self.coordinator!r} is not HOST:PORT, where process 0 listens"
            )
        if self.num_processes < 0:
            raise ValueError(f"--num_processes: {self.num_processes} is not at least 1")
        if self.num_processes and self.process_id >= self.num_processes:
            raise ValueError(
                f"--process_id: {self.process_id} is not below --num_processes, "
                f"{self.num_processes}; they count from 0"
            )
        if self.process_id < -1:
            raise ValueError(f"--process_id: {self.process_id} is not at least 0")

    @property
    def together(self) -> bool:
        """Whether this process is one of several, or a cluster is to say so."""
        return self.auto or bool(self.coordinator) or self.num_processes > 1

    def check_complete(self) -> None:
        """Raises ValueError if a process could not find the others by this."""
        if self.auto or not self.together:
            return
        for name, missing, example in (
            ("coordinator", not self.coordinator, "=HOST:PORT of process 0"),
            ("num_processes", not self.num_processes, "=N"),
            ("process_id", self.process_id < 0, "=I, from 0"),
        ):
            if missing:
                raise ValueError(
                    f"--{name}: is not given; give --{name}{example}, or --distributed=auto on a "
                    "TPU pod, SLURM or Kubernetes"
                )

    def words(self) -> list[str]:
        """The same as options of a command."""
        words = ["--distributed=auto"] if self.auto else []
        words += [f"--coordinator={self.coordinator}"] if self.coordinator else []
        words += [f"--num_processes={self.num_processes}"] if self.num_processes else []
        words += [f"--process_id={self.process_id}"] if self.process_id >= 0 else []
        for name in ("heartbeat_timeout", "barrier_timeout"):
            value = getattr(self, name)
            words += [f"--{name}={value:g}"] if value != getattr(Processes, name) else []
        return words


ALONE = Processes()
