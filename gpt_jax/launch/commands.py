"""What `gpt-jax launch up`, `status`, `logs` and `stop` do.  Starts no JAX."""

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.launch import batch, tpu
from gpt_jax.launch.gcloud import ACTIVE, CloudError, Queue
from gpt_jax.launch.group import FAILED, FINISHED
from gpt_jax.launch.hosts import Hosts
from gpt_jax.launch.job import Job, plan_job
from gpt_jax.launch.record import Record, load, log_path
from gpt_jax.launch.shipment import Shipment, pack, shipment
from gpt_jax.launch.standing import clock
from gpt_jax.launch.target import MOUNTS, Target, bucket_of, check_name, check_secrets, mounted

_PACKAGE = pathlib.Path(__file__).parent
Say = Callable[[str], None]
_ORDER = ("config", "workdir", "sweep", "allow_dirty")
_TARGET = (
    "name", "project", "zone", "topology", "slices", "spot", "reserved", "price", "max_cost",
    "max_wait",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be launched: the options that every target has.

    Attributes:
      config: "FILE[:args]".
      workdir: gs://..., or for SLURM an absolute path.
      overrides: "a.b=value" each.
      sweep: FILE has sweep_<name>(); "": one run.
      allow_dirty: What is not committed is shipped too.
    """

    config: str
    workdir: str
    overrides: Sequence[str] = ()
    sweep: str = ""
    allow_dirty: bool = False


def up(given: Mapping[str, Any], overrides: Sequence[str], folder: pathlib.Path) -> int:
    """`gpt-jax launch up` by its options; a number that is 0 was not given.

    Raises:
      ValueError: Names the option.
    """
    given = {
        k: v or None if k in ("price", "max_cost", "max_wait") else v for k, v in given.items()
    }
    order = Order(overrides=overrides, **{k: given[k] for k in _ORDER})
    out = pathlib.Path(given["out"])
    if given["target"] not in ("tpu", "gke", "slurm"):
        raise ValueError(f"--target: {given['target']!r} is not one of tpu, gke, slurm")
    if given["target"] == "slurm":
        numbers = given["nodes"], given["gpus_per_node"]
        return on_slurm(order, given["name"], *numbers, given["secret"], out)
    target = Target(secrets=tuple(given["secret"]), **{k: given[k] for k in _TARGET})
    if given["target"] == "gke":
        return on_gke(order, target, given["image"], out)
    how = {k: given[k] for k in ("dry_run", "keep", "poll")}
    return on_tpu(order, target, folder, **how, say=functools.partial(print, flush=True))


def on_tpu(
    order: Order,
    target: Target,
    folder: pathlib.Path,
    *,
    dry_run: bool = False,
    keep: bool = False,
    poll: float = 15.0,
    say: Say = print,
) -> int:
    """Launches on TPU VMs and follows the job to its end; see launch.tpu.up.

    With `dry_run` it prints the commands and runs none.

    Raises:
      ValueError: As of Target, shipment and plan_job.
    """
    bucket_of(order.workdir)  # before anything is looked at
    secrets = _values(target.secrets)
    shipped, job = _plan(order, secrets, several_hosts=target.num_hosts > 1)
    hosts = Hosts(target, secrets, MOUNTS)
    if dry_run:
        say("\n".join(_plan_lines(order, target, shipped, job, hosts, keep)))
        return FINISHED
    old = load(folder, target.name)
    record = Record(target, order.workdir)
    if old is not None and old.job == job.id:  # the same again: what it has cost counts on
        record = dataclasses.replace(old, target=target, workdir=order.workdir, code_of_end=None)
    record.job, record.code = job.id, shipped.described
    record.command = _command_lines(job)
    say(f"launch: {target.name}: {shipped.described}, {len(job.runs)} runs, {_size(target)}")
    with tempfile.TemporaryDirectory() as scratch:
        archive = pathlib.Path(scratch) / hosts.archive_name()
        pack(shipped, job.to_json(), archive)
        code = tpu.up(record, job, archive, hosts, folder, keep=keep, poll=poll, say=say)
    say("\n".join(_lines(record)))
    return code


def on_gke(order: Order, target: Target, image: str, out: pathlib.Path, say: Say = print) -> int:
    """Writes a JobSet and the archive of the code to `out`, and says how they are put to use.

    Raises:
      ValueError: As of on_tpu.
    """
    bucket_of(order.workdir)
    shipped, job = _plan(order, _values(target.secrets), several_hosts=target.num_hosts > 1)
    out.mkdir(parents=True, exist_ok=True)
    archive = f"{order.workdir.rstrip('/')}/launch/{target.name}-{job.id}.tar.gz"
    file = out / pathlib.PurePosixPath(archive).name
    pack(shipped, job.to_json(), file)
    manifest = out / f"{target.name}.json"
    values = batch.jobset(target, job, mounted(archive), image)
    manifest.write_text(json.dumps(values, indent=2) + "\n")
    say(f"{shipped.described}: {file} and {manifest}; then")
    say(shlex.join(["gcloud", "storage", "cp", str(file), archive]))
    if target.secrets:  # neither in a file nor among a command's words
        files = (f'--from-file={name}=<(printf %s "${name}")' for name in target.secrets)
        say(f"kubectl create secret generic {target.name} {' '.join(files)}")
    say(shlex.join(["kubectl", "apply", "-f", str(manifest)]))
    say(f"kubectl get jobset {target.name}; kubectl delete jobset {target.name}")
    return FINISHED


def on_slurm(
    order: Order,
    name: str,
    nodes: int,
    gpus_per_node: int,
    secrets: Sequence[str],
    out: pathlib.Path,
    say: Say = print,
) -> int:
    """Writes a script for sbatch and the archive of the code to `out`, and says how to use them.

    Raises:
      ValueError: As of on_tpu; a bucket, which the nodes of a cluster do not mount.
    """
    check_name(name)
    for option, number, least in (("nodes", nodes, 1), ("gpus_per_node", gpus_per_node, 0)):
        if number < least:
            raise ValueError(f"--{option}: {number} is not at least {least}")
    if not order.workdir.startswith("/"):
        raise ValueError(f"--workdir: {order.workdir!r} is not an absolute path that nodes share")
    check_secrets(secrets)
    several = nodes * max(1, gpus_per_node) > 1
    shipped, job = _plan(order, _values(secrets), several_hosts=several)
    if job.buckets:
        raise ValueError(f"--workdir: gs://{job.buckets[0]} is not mounted by the nodes")
    out.mkdir(parents=True, exist_ok=True)
    file, script = out / f"{name}.tar.gz", out / f"{name}.sh"
    pack(shipped, job.to_json(), file)
    there = f"{order.workdir.rstrip('/')}/launch/{name}-{job.id}"
    script.write_text(batch.slurm_script(name, there, nodes, gpus_per_node, secrets))
    say(f"{shipped.described}: {file} and {script}; then, where sbatch is,")
    say(shlex.join(["mkdir", "-p", there]))
    say(shlex.join(["tar", "-xzf", str(file), "-C", there]))
    say(shlex.join(["sbatch", str(script)]))
    return FINISHED


def status(folder: pathlib.Path, name: str, say: Say = print) -> int:
    """Says where a launch stands: slices, hosts, the last row of its metrics, costs."""
    record = _record(folder, name)
    try:
        state, reason = Queue(record.target).state()
    except CloudError as error:
        say(f"launch: {error}")
        say("\n".join(_lines(record)))
        return FAILED
    if state == ACTIVE:
        record.still_active(time.time())
        reports = Hosts(record.target, {}).look_at_all()
        rows = [report["row"] for report in reports if report["row"]]
        record.row = rows[0] if rows else record.row
        states = ", ".join(sorted({f"the job is {report['state']}" for report in reports}))
        answers = f"{len(reports)} of {record.target.num_hosts} hosts answer"
        record.state = f"{answers}, {states}" if states else answers
    say("\n".join([f"cloud    {state}" + (f": {reason}" if reason else ""), *_lines(record)]))
    return FINISHED


def logs(
    folder: pathlib.Path, name: str, worker: int, follow: bool, poll: float, say: Say = print
) -> int:
    """Prints the log of a host of the first slice; without one, what `up` has seen of it."""
    record = _record(folder, name)
    hosts, offset = Hosts(record.target, {}), 0
    report = hosts.look(offset, worker) if Queue(record.target).state()[0] == ACTIVE else None
    if report is None:
        path = log_path(folder, name)
        say(path.read_text() if path.exists() else f"launch: {name} has no log yet")
        return FINISHED
    while report is not None:
        print(report["log"], end="", flush=True)
        offset = report["offset"]
        if not follow or report["state"] != "running":
            break
        time.sleep(poll)
        report = hosts.look(offset, worker)
    return FINISHED


def stop(folder: pathlib.Path, name: str, poll: float, say: Say = print) -> int:
    """Lets the run save, and deletes the slices; where nothing is left, nothing happens."""
    record = _record(folder, name)
    queue = Queue(record.target)
    (folder / f"{name}.stop").touch()  # a `launch up` that follows it must not ask again
    try:
        if queue.state()[0] == ACTIVE:
            record.still_active(time.time())
            say("launch: the run is asked to save")
            Hosts(record.target, {}).ask_to_stop()
        tpu.give_back(queue, poll)
    except CloudError as error:
        say(f"launch: NOT deleted, it may go on to cost: {error}")
        return FAILED
    record.state = "deleted"
    record.save(folder)
    say("\n".join(["launch: deleted", *_lines(record)]))
    return FINISHED


def _record(folder: pathlib.Path, name: str) -> Record:
    check_name(name)
    record = load(folder, name)
    if record is None:
        raise ValueError(f"--name: no launch {name!r} in {folder}")
    return record


def _plan(order: Order, secrets: Mapping[str, str], *, several_hosts: bool) -> tuple[Shipment, Job]:
    """What is shipped and run.  Raises ValueError where it holds the value of a secret."""
    shipped = shipment(_PACKAGE, allow_dirty=order.allow_dirty)
    job = plan_job(
        order.config,
        order.workdir,
        order.overrides,
        root=shipped.root,
        commit=shipped.commit,
        diff=shipped.diff,
        sweep=order.sweep,
        several_hosts=several_hosts,
        mounts=MOUNTS,
    )
    for name, value in secrets.items():
        if value in job.to_json():
            raise ValueError(f"--secret: the value of {name} is in the config or its overrides")
        if value.encode() in shipped.diff:
            raise ValueError(f"--allow_dirty: the value of {name} is in the uncommitted files")
    return shipped, job


def _values(secrets: Sequence[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in secrets}


def _plan_lines(
    order: Order, target: Target, shipped: Shipment, job: Job, hosts: Hosts, keep: bool
) -> list[str]:
    """What `up` would do, in order."""
    queue, lines = Queue(target), [f"# code: {shipped.described}; {_size(target)}"]
    lines += [f"# runs: {line}" for line in _command_lines(job)]
    lines += [str(queue.create()), "# until it is ACTIVE:", str(queue.describe())]
    lines += ["# the slices are there, and cost; if one of these fails they are deleted:"]
    lines += [str(queue.copy(hosts.archive_name())), str(hosts.prepare(job))]
    if target.secrets:
        for node in range(target.slices):
            lines.append(str(queue.describe_slice(node)))
            lines += [str(hosts.send_secrets(node, w)) for w in range(target.hosts_per_slice)]
    lines += [str(hosts.start()), "# until it has ended:", str(queue.describe())]
    lines += [str(hosts.status(0)), "# when the first host has ended:", str(hosts.status_of_all())]
    lines += ["# after a crash:", str(hosts.start(again=True))]
    if target.max_cost is not None:
        lines += [f"# when it has cost {target.max_cost:g}:", str(hosts.stop())]
    lines += ["# --keep: nothing is deleted"] if keep else ["# at the end:", str(queue.delete())]
    return lines


def _command_lines(job: Job) -> list[str]:
    return [shlex.join(["gpt-jax", "train", *run.arguments]) for run in job.runs]


def _size(target: Target) -> str:
    how = "spot, " if target.spot else "reserved, " if target.reserved else ""
    slices = f"{target.slices} x " if target.slices > 1 else ""
    chips, hosts = target.num_chips, target.num_hosts
    return f"{slices}{target.topology} ({how}{hosts} hosts, {chips} chips)"


def _lines(record: Record) -> list[str]:
    seconds = sum(end - begin for begin, end in record.active)
    cost = "" if record.cost is None else f": {record.cost:.2f} at {record.target.price:g} each"
    again = f", {record.starts} starts, taken away {record.preemptions} times"
    return [
        f"launch   {record.target.name}: {record.state}{again}",
        f"slices   {_size(record.target)}",
        f"code     {record.code}",
        f"workdir  {record.workdir}",
        f"row      {_row_words(record.row)}",
        f"active   {clock(seconds)}, {record.chip_hours:.2f} chip-hours{cost}",
    ]


def _row_words(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "none yet"
    words = [f"{row.get('run', '')}: step {row.get('step', '?')}"]
    for key, value in row.items():
        if "loss" in key and isinstance(value, int | float):
            words.append(f"{key} {value:.4f}")
    return ", ".join(words)
