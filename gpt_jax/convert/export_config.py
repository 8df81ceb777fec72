"""Which family of Hugging Face's a model of ours is one of, and its config.json.  Starts no JAX.

A family writes a config.json (`Family.to_config`) and its own reader (`Family.values`) says what
model that is: if that is not ours, the family does not have it, and the fields that differ say why.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.convert.source import ARCHITECTURES
from gpt_jax.convert.table import Family
from gpt_jax.models.config import TransformerConfig

# Fields that say how a model is computed or was trained, not what it is.
_FREE = (
    "scan", "remat", "dtype", "attention", "dropout", "init", "lora_rank", "lora_alpha",
    "lora_targets", "experts_per_token", "expert_capacity", "expert_balance", "router_z_loss",
)  # fmt: skip
_HEADS_OF_CLASSES = ("sequence", "tokens")


def hf_config(
    config: TransformerConfig, labels: Sequence[str], where: str
) -> tuple[Family, dict[str, Any]]:
    """The family that has this model, and its config.json but for special tokens and dtypes.

    Args:
      config: Ours; `start_id` is an id where there is a decoder behind an encoder.
      labels: Names of its classes; (): theirs are numbered.
      where: Named in errors: the model.

    Raises:
      ValueError: No family has such a model; the text names what the nearest one lacks.
    """
    found: list[tuple[str, dict[str, tuple[Any, Any]]]] = []
    for family in _families():
        values = _written(family, config, labels)
        try:
            theirs = _read_back(family, values)
        except ValueError:  # not even one of its own: a head that it cannot have
            continue
        differ = _differences(config, theirs)
        if not differ:
            return family, values
        found.append((values["architectures"][0], differ))
    name, differ = min(found, key=lambda one: ("family" in one[1], len(one[1])))
    fields = ", ".join(f"{key} {theirs!r} (not {own!r})" for key, (own, theirs) in differ.items())
    raise ValueError(
        f"--from: {where} is a model that no family of Hugging Face's has; the nearest, {name}, "
        f"would have {fields}"
    )


def _families() -> list[Family]:
    families: list[Family] = []
    for family in ARCHITECTURES.values():
        if family.to_config is not None and family not in families:
            families.append(family)
    return families


def _written(family: Family, config: TransformerConfig, labels: Sequence[str]) -> dict[str, Any]:
    assert family.to_config is not None
    values = {**family.to_config(config), "tie_word_embeddings": config.tied}
    if config.head in _HEADS_OF_CLASSES:
        names = list(labels) or [f"LABEL_{i}" for i in range(config.num_classes)]
        assert len(names) == config.num_classes, names
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
    return values


def _read_back(family: Family, values: dict[str, Any]) -> TransformerConfig:
    tied = values["tie_word_embeddings"]
    return TransformerConfig(**family.values(HFConfig(values, "config.json")), tied=tied)


def _differences(ours: TransformerConfig, theirs: TransformerConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (ours, theirs) where the models differ."""
    a, b = dataclasses.asdict(_plain(ours)), dataclasses.asdict(_plain(theirs))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name] and name not in _FREE}


def _plain(c: TransformerConfig) -> TransformerConfig:
    """The same model with defaults in the fields that do not matter in it."""
    unused = {
        "relative_buckets": c.positions != "relative",
        "relative_max_distance": c.positions != "relative",
        "rope_theta": c.positions != "rotary",
        "pool": c.head != "sequence",
        "classifier_bias": not c.bias or c.head not in (*_HEADS_OF_CLASSES, "span"),
        "qkv_bias": c.bias,
        "score_width": c.score_width == c.head_dim or not c.scale_attention,
        "tied": c.head != "lm",
        "scale_logits": c.head != "lm",
        "logit_softcap": c.head != "lm",
        "start_id": c.family != "encoder_decoder",
    }
    fields = {field.name: field.default for field in dataclasses.fields(c)}
    defaults = {name: fields[name] for name, without in unused.items() if without}
    if defaults.get("pool") and c.family == "decoder":
        defaults["pool"] = "last"
    return dataclasses.replace(c, **defaults)
