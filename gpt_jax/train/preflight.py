"""Whether a config fits a slice, and what a step of it costs there: compiled, not guessed."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from gpt_jax.optim.durations import Duration
from gpt_jax.parallel import topologies
from gpt_jax.parallel.collectives import Collective, collectives
from gpt_jax.parallel.peaks import peak_of_kind
from gpt_jax.parallel.topologies import CHIPS, GIB, Topology
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.train.ahead_of_time import (
    CompiledStep,
    abstract_run,
    bytes_on_a_device,
    clock,
    compile_step,
)

# Compilations of changed configs before it is said that none was found.
_MOST_TRIES = 5

# Fields to change, a slice, and its devices.
Candidate = tuple[dict[str, object], Topology, list]


@dataclasses.dataclass(frozen=True)
class Flight:
    """A config on a slice.

    Attributes:
      topology: The slice.
      config: What was compiled.
      step: What compiling told; None: it does not fit.
      refusal: What the compiler said then.
      sent: What a device sends in a step, by mesh axes.
    """

    topology: Topology
    config: RunConfig
    step: CompiledStep | None
    refusal: str = ""
    sent: tuple[Collective, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    def useful_seconds(self) -> float:
        """The products that FLOPs count, at the data sheet's rate: what MFU is a share of."""
        peak = peak_of_kind(CHIPS[self.topology.chip].kind)
        assert peak is not None and self.step is not None
        rate = getattr(peak, self.config.model.dtype) * self.topology.num_chips
        return self.step.flops_per_token * self.tokens_per_step / rate

    def compute_seconds(self) -> float:
        """All products of a step, those that are computed again too, at the data sheet's rate."""
        assert self.step is not None
        again = self.step.recomputed_flops_per_token / self.step.flops_per_token
        return self.useful_seconds() * (1 + again)

    def network_seconds(self) -> float:
        """What a device sends, at the rate of its links; over `data` of several slices, of DCN."""
        link = CHIPS[self.topology.chip].link
        slow = self.topology.slices > 1
        return sum(
            row.bytes / (topologies.DCN if slow and "data" in row.axes else link)
            for row in self.sent
        )

    def step_seconds(self) -> float:
        """The longer of the two: what is sent is sent while there is something to compute."""
        return max(self.compute_seconds(), self.network_seconds())


def fly(config: RunConfig, topology: Topology, devices: list) -> Flight:
    """Compiles the config's step for a slice, unless it is plain that it cannot fit.

    Raises:
      ValueError: The mesh or the batch does not fit the slice at all.
    """
    if reason := _too_large(config, topology, devices):
        return Flight(topology, config, None, reason)
    return _compiled(config, topology, devices)


def _compiled(config: RunConfig, topology: Topology, devices: list) -> Flight:
    try:
        step = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Flight(topology, config, None, _reason(str(error)))
    sent = tuple(collectives(step.executable.as_text(), step.mesh))
    return Flight(topology, config, step, sent=sent)


def nearest_fit(
    config: RunConfig, topology: Topology, devices: list, say: Callable[[str], None]
) -> tuple[dict[str, object], Flight] | None:
    """The first change, of those that cost least, with which it compiles.

    Args:
      config, topology, devices: What does not fit.
      say: Told of each try.

    Returns:
      The changed fields, and what compiling them told; None: none of the changes is enough.
    """
    changes = _changes(config, topology.slices)
    return _first_fit(config, topology, ((change, topology, devices) for change in changes), say)


def larger_fit(
    config: RunConfig, topology: Topology, devices_of: Callable[[Topology], list], say: Callable
) -> tuple[dict[str, object], Flight] | None:
    """The smallest larger slice that a config fits, split over all chips and with full remat.

    Args:
      config, topology: What does not fit.
      devices_of: Gives a slice's devices.
      say: Told of each try.

    Returns:
      The changed fields, and what compiling them told; None: nothing that was tried holds it.
    """

    def candidates() -> Iterator[Candidate]:
        for slice_ in topologies.larger(topology):
            rows = config.train.batch_size // slice_.num_chips  # of a device
            change = {"mesh.data": slice_.slices, "mesh.fsdp": -1, "mesh.tensor": 1}
            change |= {"model.remat": "full", "model.scan": True}
            change |= {"train.num_microbatches": math.gcd(rows, config.train.num_microbatches)}
            yield change, slice_, devices_of(slice_)

    return _first_fit(config, topology, candidates(), say)


def _first_fit(
    config: RunConfig, here: Topology, candidates: Iterable[Candidate], say: Callable[[str], None]
) -> tuple[dict[str, object], Flight] | None:
    """The first candidate that compiles; what is refused without compiling is not counted."""
    tries, seen = 0, [(config, here)]
    for change, topology, devices in candidates:
        words = _in_words(change)
        words = words if topology == here else f"{topology.name} {words}"
        try:
            changed = with_fields(config, change)
            if (changed, topology) in seen:
                continue
            seen.append((changed, topology))
            reason = _too_large(changed, topology, devices)
        except ValueError:
            continue  # heads or rows that do not divide
        if reason:
            say(f"  {words}: {reason}")
            continue
        if tries == _MOST_TRIES:
            return None
        tries += 1
        flight = _compiled(changed, topology, devices)
        say(f"  {words}: {'fits' if flight.step else flight.refusal}")
        if flight.step:
            return change, flight
    return None


def _too_large(config: RunConfig, topology: Topology, devices: list) -> str:
    """Why no compiler could make it fit; "": it may.

    The update waits for the norm of the whole gradient, so that is there beside the state.
    """
    run = abstract_run(config, devices)
    needed = run.state_bytes + bytes_on_a_device(run.state.params)
    if needed <= (hbm := CHIPS[topology.chip].hbm):
        return ""
    return (
        f"does not fit: the state and the gradient alone are {needed / GIB:.1f} GiB of a device's "
        f"{hbm / GIB:.0f}"
    )


def _in_words(change: dict[str, object]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def with_fields(config: RunConfig, fields: dict[str, object]) -> RunConfig:
    """The config with dotted fields changed."""
    values = config.to_dict()
    for name, value in fields.items():
        section, leaf = name.split(".")
        values[section][leaf] = value
    return run_config(values)


def _changes(config: RunConfig, slices: int) -> Iterator[dict[str, object]]:
    """From what costs least time to what costs most."""
    split = {"mesh.data": slices, "mesh.fsdp": -1, "mesh.tensor": 1}
    again = {"model.remat": "full", "model.scan": True}
    if config.model.remat != "full":
        yield again
    yield split
    base = {**split, **again}
    yield base
    for tensor in (1, 4, 8):
        for times in (1, 4, 16):
            number = config.train.num_microbatches * times
            if (tensor, times) != (1, 1):
                yield {**base, "mesh.tensor": tensor, "train.num_microbatches": number}


def _reason(message: str) -> str:
    found = re.search(r"Used ([\d.]+\w+) of ([\d.]+\w+) hbm", message) or re.search(
        r"\(([\d.]+\w+)\) exceeds available HBM \(([\d.]+\w+)\)", message
    )
    if found:
        return f"does not fit: needs {found[1]} of a device's {found[2]}"
    return "does not fit: " + " ".join(message.split())[:160]


def report(flight: Flight, price: float | None = None) -> list[str]:
    """What a person reads of a config that fits.

    Args:
      flight: Compiled.
      price: Of a chip and hour, in the user's currency; None: no costs.
    """
    step, topology = flight.step, flight.topology
    assert step is not None
    shape = ", ".join(f"{name} {size}" for name, size in step.mesh.shape.items() if size > 1)
    lines = [
        f"{topology.name}: {topology.num_chips} chips ({CHIPS[topology.chip].kind}), mesh {shape}",
        f"  compiled in {step.seconds:.0f} s ({step.processor_seconds:.0f} s of processor time); "
        f"{step.num_parameters:,} parameters",
        "  bytes a device, as the compiler counts them",
    ]
    for words, number in (
        ("state", step.state_bytes),
        ("arguments", step.argument_bytes),
        ("temporaries", step.temporary_bytes),
        ("all", step.peak_bytes),
        ("memory (HBM)", CHIPS[topology.chip].hbm),
    ):
        lines.append(f"    {words:14} {number / GIB:8.2f} GiB")
    flops = step.flops_per_token * flight.tokens_per_step
    lines.append(f"  FLOPs a step    {flops:.3e} (6 a weight of a product, causal attention half)")
    lines.append("  sent by a device in a step")
    for row in flight.sent:
        axes = " x ".join(row.axes)
        lines.append(f"    {axes:14} {row.kind:18} {row.count:5} {row.bytes / GIB:9.3f} GiB")
    return lines + _times(flight, price)


def _times(flight: Flight, price: float | None) -> list[str]:
    compute, network = flight.compute_seconds(), flight.network_seconds()
    bound = "arithmetic" if compute >= network else "communication"
    seconds = flight.step_seconds()
    a_day = 86400 / seconds * flight.tokens_per_step
    lines = [
        f"  at best, if all products ran at the data sheet's rate and what is sent were sent "
        f"meanwhile ({bound}-bound)",
        f"    products {compute * 1e3:.1f} ms, network {network * 1e3:.1f} ms: a step "
        f"{seconds * 1e3:.1f} ms, MFU {flight.useful_seconds() / seconds:.0%}, "
        f"{a_day:.3g} tokens a day",
    ]
    duration = Duration.parse("train.duration", flight.config.train.duration)
    if duration.unit == "epochs":
        return [*lines, "    how long it takes is not known without the data (train.duration)"]
    steps = duration.steps(clock(flight.config))
    hours = steps * seconds / 3600
    cost = "" if price is None else f", {hours * flight.topology.num_chips * price:,.0f} to pay"
    lines.append(f"    {steps:,} steps: {_duration(hours)} at least{cost}")
    return lines


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{np.ceil(hours * 60):.0f} minutes"
