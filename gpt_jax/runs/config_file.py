"""From `--config=FILE[:args] --config.a.b=value` to values and where each of them is from.

Starts no JAX.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.runs.config import fields, flatten, parse_value

FILE, ARGUMENT, COMMAND_LINE = "file", "argument", "command line"
_SWEEP = "sweep_"


def load_config(spec: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads a config.

    Args:
      spec: Path of a Python file that defines get_config(arg) -> ConfigDict, and after a colon the
        argument string: "configs/gpt.py:size=1m,debug".
      overrides: "a.b=value" each, for any field of RunConfig, read as that field's type. Of two for
        one field the later counts.

    Returns:
      The config as nested dicts, and for each leaf's dotted name where its value is from: "file",
      "argument" or "command line".

    Raises:
      ValueError: No such file, a file without get_config, a bad argument string or override.
    """
    path, _, argument = spec.partition(":")
    module = _import_file(path)
    values = module.get_config(argument or None).to_dict()
    plain = flatten(module.get_config(None).to_dict()) if argument else flatten(values)
    origins = {
        name: FILE if name in plain and plain[name] == value else ARGUMENT
        for name, value in flatten(values).items()
    }
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--config.{name}: give a value, --config.{name}=VALUE")
        *sections, leaf = name.split(".")
        value, target = parse_value(name, text), values
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
        origins[name] = COMMAND_LINE
    return values, origins


def load_sweep(spec: str, name: str) -> list[dict[str, Any]]:
    """The runs of a sweep that a config file defines as sweep_<name>().

    Args:
      spec: As of load_config; the argument string does not enter.
      name: Of the sweep.

    Returns:
      What the function yields: {dotted field: value} each.

    Raises:
      ValueError: No such file or sweep (those it has are listed), no run in it, or one that is not
        a dict.
    """
    path = spec.partition(":")[0]
    module = _import_file(path)
    known = [x.removeprefix(_SWEEP) for x in vars(module) if x.startswith(_SWEEP)]
    if name not in known:
        those = f"is not one of {', '.join(known)}" if known else "is none: there is no sweep"
        raise ValueError(f"--sweep: {name!r} {those} in {path!r} (functions {_SWEEP}<name>)")
    runs = list(getattr(module, _SWEEP + name)())
    for number, run in enumerate(runs, start=1):
        if not isinstance(run, Mapping):
            raise ValueError(f"--sweep: run {number} of {name!r} is {run!r}, not a dict of fields")
    if not runs:
        raise ValueError(f"--sweep: {name!r} has no run")
    return [dict(run) for run in runs]


def override_text(name: str, value: Any) -> str:
    """An override "a.b=value" for load_config that gives the field exactly this value.

    Raises:
      ValueError: No such field (with the nearest one), or a value that is not of its type.
    """
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()  # numpy's numbers are not written as Python reads them
    if isinstance(value, list):
        value = tuple(value)
    text = value if isinstance(value, str) else repr(value)
    read = parse_value(name, text)
    if read != value or isinstance(read, str) != isinstance(value, str):
        raise ValueError(f"{name}: {value!r} is not of type {_type_name(fields()[name])}")
    return f"{name}={text}"


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _import_file(path: str) -> Any:
    file = pathlib.Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"--config: {path!r} does not exist; give the path of a config file")
    if file.suffix != ".py":
        raise ValueError(f"--config: {path!r} is not a Python file with get_config(arg)")
    # Configs import `configs.common`: the folder above the outermost package-like folder.
    root = next((p.parent for p in file.parents if p.name in ("configs", "experiments")), None)
    if root is not None and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {path!r} does not define get_config(arg)")
    return module
