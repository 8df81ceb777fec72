"""From a profiler's trace and the compiled program's text to a table of the slowest operations.

A trace says when an operation ran and for how long, the program's text what it is: a fusion's name
does not tell that there is a product inside.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from etils import epath
from jax.profiler import ProfileData

_SHOWN = 40  # rows of the table for people; the other one has all

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\]})] )([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_WHERE = re.compile(r'op_name="([^"]*)"')
# Parts of an op_name that are of transformations and loops, not of the model.
_SCOPE = re.compile(r"(jit|jvp|transpose|rematted_computation|checkpoint|while|body|closed_call)\b")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

_PRODUCTS = {"dot", "convolution", "ragged-dot"}
_PRODUCT_CALLS = re.compile(r"gemm|matmul|conv|cudnn|dot", re.IGNORECASE)
_BETWEEN_DEVICES = re.compile(r"^(all-|reduce-scatter|collective-|send|recv)")
_MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose", "slice",
    "reshape", "concatenate", "broadcast", "iota", "pad", "reverse", "dynamic-slice",
    "dynamic-update-slice", "copy-start", "copy-done", "convert",
}  # fmt: skip
_INSIDE = {"gather", "scatter", "sort", "reduce", "reduce-window"}  # that name a fusion's kind
_FRAMES = {"while", "conditional"}  # they take as long as what they hold, which is listed too


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, over all the steps of a trace.

    Attributes:
      name: In the program's text.
      kind: "product", "element-wise", "reduce", "data movement", "between devices" or what XLA
        calls it.
      milliseconds: Of all its runs, without operations inside of it.
      count: Runs, on all devices.
      where: The place in the model that it was made for.
    """

    name: str
    kind: str
    milliseconds: float
    count: int
    where: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program's text says.

    Attributes:
      module: Its name.
      kinds: By the name of an instruction.
      wheres: The same.
    """

    module: str
    kinds: dict[str, str]
    wheres: dict[str, str]


def read_program(text: str) -> Program:
    """Reads XLA's HLO text."""
    module = re.match(r"HloModule ([^\s,]+)", text)
    opcodes: dict[str, set[str]] = collections.defaultdict(set)  # by computation
    found: list[tuple[str, str, str, str]] = []
    computation = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            name, rest = instruction[1], instruction[2]
            code = _OPCODE.search(rest)
            if code is None:
                continue
            target = _TARGET.search(rest)
            opcode = _call_kind(target[1]) if target else code[1]
            calls, where = _CALLS.search(rest), _WHERE.search(rest)
            opcodes[computation].add(opcode)
            found.append((name, opcode, calls[1] if calls else "", where[1] if where else ""))
    kinds = {
        name: _kind({opcode} if opcode != "fusion" else opcodes[calls])
        for name, opcode, calls, _ in found
    }
    wheres = {name: _place(where) for name, _, _, where in found}
    return Program(module[1] if module else "", kinds, wheres)


def _call_kind(target: str) -> str:
    return "dot" if _PRODUCT_CALLS.search(target) else f"call of {target}"


def _kind(opcodes: set[str]) -> str:
    """The kind of an operation, or of a fusion with these inside: what weighs most decides."""
    if opcodes & _PRODUCTS:
        return "product"
    for opcode in sorted(opcodes):
        if _BETWEEN_DEVICES.match(opcode):
            return "between devices"
    if inside := opcodes & _INSIDE:
        return sorted(inside)[0]
    if opcodes <= _MOVES:
        return "data movement"
    if len(opcodes) == 1 and (opcodes & _FRAMES or next(iter(opcodes)).startswith("call")):
        return next(iter(opcodes))
    return "element-wise"


def _place(op_name: str) -> str:
    """jit(train_step)/transpose(jvp(Transformer))/stack/... as "backward: stack/..."."""
    parts = op_name.split("/")
    backward = any(part.startswith("transpose(") for part in parts)
    kept: list[str] = []
    for part in parts:
        module, _, method = part.partition("._")
        if _SCOPE.match(part):
            continue
        if not method:
            kept.append(part)
        elif not kept or module != kept[-1]:  # Flax names a module's method after the module
            kept.append(method)
    return ("backward: " if backward else "") + "/".join(kept)


def read_operations(trace: epath.PathLike, text: str) -> list[Operation]:
    """The operations of one program in a trace, the slowest first.

    Args:
      trace: An xplane.pb of `jax.profiler`.
      text: The compiled program's text; operations of other programs are left out.
    """
    program = read_program(text)
    spent: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for name, nanoseconds in _own_times(ProfileData.from_file(str(trace)), program):
        if program.kinds.get(name) not in _FRAMES:
            spent[name] += nanoseconds / 1e6
            counts[name] += 1
    return [
        Operation(
            name, program.kinds.get(name, "not known"), spent[name], counts[name],
            program.wheres.get(name, ""),
        )
        for name in sorted(spent, key=spent.get, reverse=True)
    ]  # fmt: skip


def _own_times(data: ProfileData, program: Program) -> Iterator[tuple[str, float]]:
    """(operation, nanoseconds of a run of it without those inside) of each run."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    for plane in planes or data.planes:  # XLA:CPU runs its operations on the host's threads
        lines = list(plane.lines)
        for line in [line for line in lines if line.name == "XLA Ops"] or lines:
            runs = []
            for event in line.events:
                if name := _operation(event, line.name, program):
                    runs.append((event.start_ns, event.duration_ns, name))
            # Of two that begin together the longer one is around the other.
            runs.sort(key=lambda run: (run[0], -run[1]))
            open_runs: list[list] = []  # [end, own time, name], each inside of the one before
            for start, duration, name in runs:
                while open_runs and open_runs[-1][0] <= start:
                    _, own, done = open_runs.pop()
                    yield done, own
                if open_runs:
                    open_runs[-1][1] -= duration
                open_runs.append([start + duration, duration, name])
            yield from ((name, own) for _, own, name in open_runs)


def _operation(event, line: str, program: Program) -> str:
    """The name of the program's operation that an event is a run of; "": of none."""
    stats = dict(event.stats)
    if "hlo_op" in stats:
        ours = str(stats.get("hlo_module", "")).startswith(program.module)
        return str(stats["hlo_op"]) if ours else ""
    if line == "XLA Ops":  # a TPU's: the instruction's text is the event's name
        name = event.name.split(" = ")[0].lstrip("%")
        return name if name in program.kinds else ""
    return ""


def write_operations(folder: epath.PathLike, operations: list[Operation], steps: list[int]) -> None:
    """Writes operations.tsv (all) and operations.md (by kind, and the slowest) to the folder.

    Args:
      folder: It exists.
      operations: The slowest first.
      steps: The steps that were traced.
    """
    folder = epath.Path(folder)
    total = sum(o.milliseconds for o in operations) or 1.0
    text = "name\tkind\ttotal_ms\tshare\tcount\twhere\n"
    for o in operations:
        figures = f"{o.milliseconds:.3f}\t{o.milliseconds / total:.4f}\t{o.count}"
        text += f"{o.name}\t{o.kind}\t{figures}\t{o.where}\n"
    (folder / "operations.tsv").write_text(text)

    by_kind: dict[str, list[float]] = {}
    for o in operations:
        entry = by_kind.setdefault(o.kind, [0.0, 0])
        entry[0] += o.milliseconds
        entry[1] += o.count
    kinds = sorted(by_kind.items(), key=lambda item: -item[1][0])
    lines = [
        f"# Operations of steps {steps[0]} to {steps[-1]}",
        "",
        f"{total / len(steps):.1f} ms of operations a step, the sum over devices and over threads "
        "that began one. Times are of all the steps and without operations inside of others.",
        "",
        *_table(
            ("kind", "ms", "share", "runs"),
            [(k, f"{ms:.1f}", f"{ms / total:.1%}", str(n)) for k, (ms, n) in kinds],
        ),
        "",
        f"The slowest {min(_SHOWN, len(operations))} of {len(operations)}; operations.tsv has all:",
        "",
        *_table(
            ("operation", "kind", "ms", "share", "runs", "where"),
            [
                (o.name, o.kind, f"{o.milliseconds:.2f}", f"{o.milliseconds / total:.1%}",
                 str(o.count), o.where)
                for o in operations[:_SHOWN]
            ],
        ),
    ]  # fmt: skip
    (folder / "operations.md").write_text("\n".join(lines) + "\n")


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [titles, tuple("---" for _ in titles), *rows]
    return ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in cells]
