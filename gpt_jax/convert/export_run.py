"""A folder of Hugging Face's made of a run: the tables read from right to left."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import trees
from gpt_jax.convert.export_config import hf_config
from gpt_jax.convert.export_tokenizer import special_ids, write_tokenizer
from gpt_jax.convert.open_model import SPECIAL_IDS, OpenModel, open_model
from gpt_jax.convert.table import Entry, Family
from gpt_jax.convert.tensors import DTYPES, ToWrite, write_safetensors
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.lora import merge_lora
from gpt_jax.models.mup import fold_mup
from gpt_jax.types import Tree

SHARD_SIZE = 5_000_000_000
# Group of a table -> the models that have it.
_GROUPS: dict[str, Callable[[TransformerConfig], bool]] = {
    "": lambda c: True,
    "head": lambda c: c.head == "lm" and not c.tied,
    "gated": lambda c: c.activation in ("swiglu", "geglu"),
    "plain": lambda c: c.activation not in ("swiglu", "geglu"),
    "mlm": lambda c: c.head == "mlm",
    "pooler": lambda c: c.head == "sequence" and c.pool == "pooler",
    "classifier": lambda c: c.head in ("sequence", "tokens"),
    "span": lambda c: c.head == "span",
}


def export_run(
    source: str,
    to: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> tuple[Path, dict[str, Any]]:
    """Writes a folder that transformers reads to the same model.

    Args:
      source: A run directory, or anything that open_model reads. Adapters are merged, and what
        muP multiplies becomes part of the weights (models.mup).
      to: A new or empty folder. It appears, whole, when all is written.
      step: A run's checkpoint; None: its best or newest.
      dtype: "float32", exact, or "bfloat16".
      shard_size: Bytes of the largest file.

    Returns:
      The folder, and what its config.json holds.

    Raises:
      ValueError: No family of Hugging Face's has this model, or `to` holds files.
    """
    to = Path(to).expanduser()
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if shard_size < 1:
        raise ValueError(f"--shard_size: {shard_size} is no number of bytes")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to: {str(to)!r} is not empty; give a new folder")
    opened = merged(open_model(source, step=step))
    config = opened.model.config
    if config.start_id < 0 and config.family == "encoder_decoder":
        config = dataclasses.replace(config, start_id=opened.tokenizer.eos_id)
    family, values = hf_config(config, opened.labels, repr(source))
    values |= {"dtype": dtype, "torch_dtype": dtype, **special_ids(opened)}
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        tensors = list(hf_tensors(family, config, opened.params, values))
        write_safetensors(folder, tensors, dtype, shard_size)
        write_tokenizer(folder, opened)
        _write_json(folder / "generation_config.json", _generation(opened))
        _write_json(folder / "config.json", values)
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        folder.rename(to)  # over an empty folder too
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return to, values


def merged(opened: OpenModel) -> OpenModel:
    """The model without adapters and multipliers of muP."""
    config, params = opened.model.config, opened.params
    if config.lora_rank:
        config, params = merge_lora(config, params)
    config, params = fold_mup(config, params)
    return dataclasses.replace(opened, model=opened.model.clone(config=config), params=params)


def hf_tensors(
    family: Family, config: TransformerConfig, params: Tree, values: dict[str, Any]
) -> Iterator[ToWrite]:
    """What the family's table makes of the parameters; none is read yet."""
    leaves, sizes = trees.flatten(params), dataclasses.asdict(config)
    bare = values["architectures"][0].endswith("Model") and config.head == "none"
    prefix = "" if bare else family.prefix
    parts: dict[str, list[tuple[Entry, int]]] = {}  # of each of their tensors: what it is made of
    used = set()
    for entry in family.table:
        if not _GROUPS[entry.group](config):
            continue
        used.add(entry.ours)
        for i, name in enumerate(entry.their_names(sizes)):
            parts.setdefault(name, []).append((entry, i))
    left = {re.sub(r"/layers_\d+/", "/layers/", name) for name in leaves} - used
    assert not left, f"the table of {values['architectures'][0]} has no place for {left}"
    for name, made_of in parts.items():
        made_of = sorted(made_of, key=lambda part: part[0].rule.part)
        rule = made_of[0][0].rule
        # What is named here is found by the time of reading: `read` is made for this tensor.
        yield ToWrite(
            name if re.match(family.heads, name) else prefix + name,
            rule.their_shape(sizes),
            lambda rule=rule, made_of=made_of: rule.to_theirs(
                [_read(leaves, entry, i) for entry, i in made_of], sizes
            ),
        )


def _read(leaves: dict[str, Any], entry: Entry, layer: int) -> np.ndarray:
    """Our parameter, of one layer; layers may be stacked or not."""
    if not entry.layers:
        return np.asarray(leaves[entry.ours])
    if entry.ours in leaves:
        return np.asarray(leaves[entry.ours][layer])
    return np.asarray(leaves[entry.ours.replace("/layers/", f"/layers_{layer}/")])


def _generation(opened: OpenModel) -> dict[str, Any]:
    """generation_config.json: the source's own, with the special tokens that there are."""
    ids = {name: value for name, value in special_ids(opened).items() if value is not None}
    said = {name: value for name, value in opened.generation.items() if name not in SPECIAL_IDS}
    return {**said, **ids}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
