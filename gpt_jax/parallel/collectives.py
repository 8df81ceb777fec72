"""What a compiled program sends between devices, by mesh axis: read from its text (HLO)."""

import dataclasses
import re
from collections import defaultdict

import numpy as np
from jax.sharding import Mesh

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({_KINDS})(?:-start)?\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a kind over the same mesh axes.

    Attributes:
      axes: Mesh axes that the devices of a group differ in.
      kind: As XLA names it.
      count: How many a step has.
      bytes: What a device sends in a step, if rings are used: with n devices and s bytes in whole,
        s (n - 1) / n for a gather or a scatter, and twice as much for a reduction to all.
    """

    axes: tuple[str, ...]
    kind: str
    count: int
    bytes: float


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a partitioned program.

    Args:
      text: `compiled.as_text()`.
      mesh: What it was compiled for.

    Returns:
      By axes and kind, the largest first. Loops count as often as their condition says; where it
      does not, once.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found: dict[tuple, list] = defaultdict(lambda: [0, 0.0])
    seen = set()
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            if not match or not times.get(name):
                continue
            # An asynchronous collective appears in the steps of its way, each with its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else (name, line)
            if key in seen:
                continue
            seen.add(key)
            axes, size = _group(line, mesh)
            if size > 1:
                entry_of = found[axes, match[2]]
                entry_of[0] += times[name]
                entry_of[1] += times[name] * _sent(match[2], _size(match[1]), size)
    rows = [Collective(axes, kind, count, sent) for (axes, kind), (count, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            computations[name].append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, number: int) -> None:
        # One that several call runs as often as the one that calls it most: copies of one
        # asynchronous computation are not more work.
        if number <= times[name]:
            return
        times[name] = number
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            trips = _trips(computations.get(loop[1], ()), line) if loop else 1
            called = _CALLED.findall(line)
            for group in _CALLED_LIST.findall(line):
                called += re.findall(r"[\w.-]+", group)
            for other in called:
                visit(other, number * trips)

    visit(entry, 1)
    return times


def _trips(condition: list[str] | tuple, line: str) -> int:
    known = re.search(r"known_trip_count\D*(\d+)", line)
    if known:
        return int(known[1])
    constants = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return max(constants, default=1)


def _size(shape: str) -> int:
    """Bytes of a result: of a tuple, all of it."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        width = _BYTES.get(dtype) or (1 if dtype.startswith("f8") else int(dtype[1:]) // 8)
        total += width * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
    return total


def _sent(kind: str, result: int, devices: int) -> float:
    """Bytes that a device sends, from those of the result and the devices of a group."""
    share = (devices - 1) / devices
    return {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": result * (devices - 1),
        "all-to-all": result * share,
        "collective-permute": float(result),
    }[kind]


def _group(line: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes in which the devices of the first group differ, and how many these are."""
    members = np.array(_first_group(line, mesh.size))
    places = np.array(np.unravel_index(members, mesh.devices.shape))
    differ = [bool(np.ptp(row)) for row in places]
    return tuple(a for a, d in zip(mesh.axis_names, differ, strict=True) if d), len(members)


def _first_group(line: str, size: int) -> list[int]:
    """The first of `replica_groups` (or the first pair that is not one device), in any spelling."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        both = [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},{")]
        return next((pair for pair in both if pair[0] != pair[1]), both[0][:1])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line
    )
    if named:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = _iota(named[2], size).reshape([int(n) for _, n in axes])
        chosen = re.findall(r"'(\w+)'", named[3])
        index = tuple(slice(None) if name in chosen else 0 for name, _ in axes)
        return ids[index].ravel().tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return [int(n) for n in listed[1].split(",") if n]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _iota(iota[3], size).reshape(int(iota[1]), int(iota[2]))[0].tolist()
    return list(range(size))


def _iota(text: str | None, size: int) -> np.ndarray:
    """ "[4,2]T(1,0)": the numbers from 0, in that shape and then transposed; None: as they are."""
    ids = np.arange(size)
    if not text:
        return ids
    shape, *order = re.findall(r"[\[(]([\d,]+)[\])]", text)
    ids = ids.reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order[0].split(",")]) if order else ids
