"""The options by which a command is one of several processes, and how such a one ends.

Starts no JAX before `one_of`.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from gpt_jax.parallel.processes import Processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", choices=["auto"], help="ask the TPU pod, SLURM or Kubernetes who is there"
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num_processes", type=int, default=0, metavar="N")
    group.add_argument("--process_id", type=int, default=-1, metavar="I", help="from 0")
    group.add_argument(
        "--heartbeat_timeout", type=int, default=Processes.heartbeat_timeout, metavar="SECONDS",
        help="without a sign of life a process is lost (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--barrier_timeout", type=float, default=Processes.barrier_timeout, metavar="SECONDS",
        help="that processes wait for each other (default: %(default)g)",
    )  # fmt: skip


def given(arguments: argparse.Namespace) -> Processes:
    """What the options say.  Raises ValueError where they do not fit together."""
    return Processes(
        auto=arguments.distributed == "auto",
        coordinator=arguments.coordinator,
        num_processes=arguments.num_processes,
        process_id=arguments.process_id,
        heartbeat_timeout=arguments.heartbeat_timeout,
        barrier_timeout=arguments.barrier_timeout,
    )


@contextlib.contextmanager
def one_of(processes: Processes) -> Iterator[bool]:
    """A context in which this is one of the processes; whether it is the first.

    An error in one of several is told to people as `main` tells it, and to the other processes,
    and ends the process there.
    """
    from gpt_jax.cli.main import tell
    from gpt_jax.parallel import distributed

    with distributed.running(processes) as peers:
        try:
            yield peers.is_first
        except BaseException as error:
            if peers.count == 1:
                raise
            code = tell(error)
            if code is None:
                late = peers.why(error)
                if late:
                    print(f"error: {late}", file=sys.stderr)
                else:
                    sys.excepthook(type(error), error, error.__traceback__)
                code = late.code if late else 1
            distributed.leave(error, code)
