"""From a sweep of a config file to the runs that it stands for.  Starts no JAX.

A run of a sweep is a dict {dotted field: value}. Two keys are not fields: "name" is the run's name,
"group" a label that the ledger keeps. "{sweep}" in a text stands for the sweep's directory, so
`"init.source": "{sweep}/english"` begins from the run of that name, and waits for it.
"""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.convert.source import inherit_model
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.config_file import load_config, load_sweep, override_text
from gpt_jax.scaling import counts

SWEEP = "{sweep}"
LEDGER, STATE, LOCK = "ledger.jsonl", "sweep.json", ".lock"
_NAME = re.compile(r"[A-Za-z0-9_+=][A-Za-z0-9_+=.-]{0,149}")
# What a name made by us shows in another form than as field=value.
_SHOWN = {
    "seed", "train.duration", "model.num_layers", "model.embed_dim", "model.num_heads",
    "model.num_kv_heads", "model.head_dim", "model.mlp_dim",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
      name: Of the run and its directory.
      group: The sweep's label.
      workdir: The run directory.
      overrides: What the sweep changes, as it says it ("{sweep}" is kept).
      arguments: For `gpt-jax train`: the config and everything that changes it.
      config: What `train` makes of them.
      needs: Names of the runs that must be finished before.
      num_params: All parameters.
      num_params_non_embedding: All but embeddings of tokens and positions.
      steps: Of the whole run; None: known when its data are read (a duration in epochs).
      num_tokens: Trained on; None as of steps.
      flops: Of the whole run by counts.FLOPS_RULE as for text; None as of steps.
    """

    name: str
    group: str
    workdir: pathlib.Path
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...]
    config: RunConfig
    needs: tuple[str, ...]
    num_params: int
    num_params_non_embedding: int
    steps: int | None
    num_tokens: int | None
    flops: float | None


def plan_sweep(
    spec: str, sweep: str, workdir: pathlib.Path, changes: Sequence[str] = ()
) -> list[PlannedRun]:
    """The runs of a sweep, each once, in its order.

    Args:
      spec: "FILE[:args]" of --config.
      sweep: The name: FILE defines sweep_<name>().
      workdir: The sweep's directory.
      changes: "a.b=value" of the command line, for every run; they win over the sweep.

    Raises:
      ValueError: No such sweep, a field or value that the config refuses (named, with the run),
        a run to begin from that is not in the sweep, two runs of one name with different configs.
    """
    workdir = pathlib.Path(os.path.abspath(workdir))
    waiting = list(enumerate(load_sweep(spec, sweep), start=1))
    found: dict[int, PlannedRun] = {}
    planned: dict[str, PlannedRun] = {}
    kept: set[str] = set()  # runs that others begin from, of another sweep in this directory
    # A run is planned when those that it begins from are: their configs say what model it inherits.
    while waiting:
        later = []
        for number, overrides in waiting:
            if any(name not in planned and name not in kept for name in _needs(overrides)):
                later.append((number, overrides))
                continue
            try:
                run = _planned(spec, overrides, workdir, changes, planned)
                _check_same(planned.get(run.name), run)
            except ValueError as error:
                raise ValueError(f"{error} (run {number} of the sweep {sweep!r})") from None
            if run.name not in planned:
                found[number] = planned[run.name] = run
        if len(later) == len(waiting):
            known = {*planned, *kept}
            missing = [(number, x) for number, run in later for x in _needs(run) if x not in known]
            kept |= {x for _, x in missing if (workdir / x / "config.json").exists()}
            if kept <= known:
                number, name = missing[0]
                raise ValueError(
                    f"init.source: '{SWEEP}/{name}' is no other run of the sweep, or waits for "
                    f"this one (run {number} of the sweep {sweep!r})"
                )
        waiting = later
    return [found[number] for number in sorted(found)]


def _planned(
    spec: str,
    overrides: Mapping[str, Any],
    workdir: pathlib.Path,
    changes: Sequence[str],
    planned: Mapping[str, PlannedRun],
) -> PlannedRun:
    given = dict(overrides)
    name, group = given.pop("name", ""), given.pop("group", "")
    for what, label in (("name", name), ("group", group)):
        if not isinstance(label, str):
            raise ValueError(f"{what}: {label!r} is not a text")
    texts = [override_text(field, _placed(x, str(workdir))) for field, x in given.items()]
    texts += changes
    config = _resolved(spec, texts, workdir, planned, name)
    groups = counts.parameter_counts(config.model)
    total = sum(groups.values())
    non_embedding = total - groups["token embedding"] - groups["position embedding"]
    tokens_per_step = config.train.batch_size * config.data.seq_len
    steps = _steps(config)
    num_tokens = None if steps is None else steps * tokens_per_step
    a_token = counts.flops_per_token(config.model, config.data.seq_len)
    run = PlannedRun(
        name=name,
        group=group,
        workdir=workdir,
        overrides=given,
        arguments=(f"--config={spec}", *(f"--config.{text}" for text in texts)),
        config=config,
        needs=tuple(other for other in _needs(overrides) if other in planned),
        num_params=total,
        num_params_non_embedding=non_embedding,
        steps=steps,
        num_tokens=num_tokens,
        flops=None if num_tokens is None else a_token * num_tokens,
    )
    name = name or _name(run)
    if not _NAME.fullmatch(name) or name.endswith(".log"):
        raise ValueError(
            f"name: {name!r} cannot name a folder; up to 150 of letters, digits and _+=.- , "
            'as "name" among the overrides'
        )
    return dataclasses.replace(run, name=name, workdir=workdir / name)


def _needs(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the runs whose directories the overrides mention."""
    found = re.findall(re.escape(SWEEP) + r"/([^/,'\")]+)", repr(list(overrides.values())))
    return tuple(dict.fromkeys(found))


def _placed(value: Any, workdir: str) -> Any:
    if isinstance(value, str):
        return value.replace(SWEEP, workdir)
    return [_placed(item, workdir) for item in value] if isinstance(value, list | tuple) else value


def _resolved(
    spec: str,
    texts: Sequence[str],
    workdir: pathlib.Path,
    planned: Mapping[str, PlannedRun],
    name: str,
) -> RunConfig:
    """The config as `train` will have it."""
    values, _ = load_config(spec, texts)
    for name in ("path", "validation_path"):
        if values.get("data", {}).get(name):
            values["data"][name] = os.path.abspath(os.path.expanduser(values["data"][name]))
    source = values.get("init", {}).get("source", "")
    begun = source and (pathlib.Path(source) / "config.json").exists()
    run = planned.get(os.path.relpath(source, workdir)) if os.path.isabs(source) else None
    if run is None or begun:
        # A run that has begun goes on with what it has: its source may be gone.
        return run_config(inherit_model(values, workdir / name if name else None))
    # The run that it begins from has no directory yet: a folder with its config stands for it.
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(run.config.to_dict())
        (pathlib.Path(folder) / "config.json").write_text(text)
        values = inherit_model({**values, "init": {**values["init"], "source": folder}})
        values["init"]["source"] = source
        tokenizer = values["data"]["tokenizer"]
        values["data"]["tokenizer"] = tokenizer.replace(folder, source)
        return run_config(values)


def _steps(config: RunConfig) -> int | None:
    duration = Duration.parse("train.duration", config.train.duration)
    length, rows = config.data.seq_len, -(-config.data.train_tokens // config.data.seq_len)
    if duration.unit == "epochs" and not rows:
        return None
    return duration.steps(Clock(config.train.batch_size * length, rows * length))


def _check_same(known: PlannedRun | None, run: PlannedRun) -> None:
    if known is None or known.config == run.config:
        return
    one, other = (json.dumps(dict(x.overrides), sort_keys=True) for x in (known, run))
    raise ValueError(
        f"name: {run.name!r} is the name of two runs with different configs, {one} and {other}; "
        'give them names: "name" among the overrides'
    )


def _name(run: PlannedRun) -> str:
    """Compute, size, data, seed, and what else the sweep changes: c1e12-n48k-d3.2m-s0."""
    words = [] if run.flops is None else [f"c{power(run.flops, 1)}".replace(".0e", "e")]
    words.append(f"n{short(run.num_params_non_embedding)}")
    duration = str(run.config.train.duration).replace(" ", "")
    words.append(f"d{duration if run.num_tokens is None else short(run.num_tokens)}")
    words.append(f"s{run.config.seed}")
    fields = [field for field in run.overrides if field not in _SHOWN]
    leaves = [field.rpartition(".")[2] for field in fields]
    for field, leaf in zip(fields, leaves, strict=True):
        label = field if leaves.count(leaf) > 1 else leaf
        words.append(f"{label}={_value_word(run.overrides[field])}")
    return "-".join(words)


def _value_word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}".replace("e+", "e")
    if isinstance(value, list | tuple):
        return "+".join(map(_value_word, value))
    word = str(value).replace(f"{SWEEP}/", "")
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", word.rstrip("/").rpartition("/")[2])


def short(number: float) -> str:
    """Three digits and a letter: 48k, 3.2m, 1.28b."""
    for scale, letter in ((1e12, "t"), (1e9, "b"), (1e6, "m"), (1e3, "k")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def power(number: float, digits: int) -> str:
    """With an exponent: 1.28e12 with two digits behind the point."""
    return re.sub(r"e\+0*", "e", f"{number:.{digits}e}")
