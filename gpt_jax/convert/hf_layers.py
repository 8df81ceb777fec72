"""What a config.json says of positions and windows, layer by layer, in all its spellings.

transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters, which may hold a section for
each type of layer. Windows are told by layer_types, or by rules of the model type. Starts no JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from gpt_jax.convert.hf_config import HFConfig
from gpt_jax.models.config import RopeScaling, TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def sliding_layers(
    config: HFConfig, num_layers: int, by_rule: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Which layers have a window: by layer_types, or by the model type's rule."""
    types = config.get("layer_types")
    if types is None:
        return tuple(bool(by_rule(i)) for i in range(num_layers))
    if len(types) != num_layers or set(types) - {FULL, SLIDING}:
        raise config.unsupported(
            "layer_types", types, f"only {FULL!r} and {SLIDING!r}, {num_layers} in all"
        )
    return tuple(kind == SLIDING for kind in types)


def window_values(window: int | None, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """Our fields for a model whose layers have this window or none."""
    if not window or not any(sliding):
        return {"window": 0, "global_layers": ()}
    return {
        "window": window,
        "global_layers": tuple(i for i, slides in enumerate(sliding) if not slides),
    }


def rope_values(
    config: HFConfig, theta: float = 10_000.0, local_theta: float | None = None
) -> dict[str, Any]:
    """Our fields for the rotary positions.

    Args:
      config: The config.
      theta: The base, where the config says nothing.
      local_theta: That of layers with a window, in a model with two bases; None: one base.

    Raises:
      ValueError: A scaling that we do not have.
    """
    config.need("partial_rotary_factor", 1.0)
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name, {})
    by_type = {kind: rope.get(kind) or {} for kind in (FULL, SLIDING)}
    if not any(by_type.values()):
        by_type = {FULL: rope, SLIDING: rope if local_theta is None else {}}
    values = {
        "rope_theta": _theta(config, by_type[FULL], "rope_theta", theta),
        "rope_scaling": dataclasses.asdict(_scaling(config, name, by_type[FULL])),
        "rope_local_theta": 0.0,
    }
    if local_theta is not None:
        local = by_type[SLIDING]
        if _scaling(config, name, local).kind != "none":
            raise config.unsupported(name, rope, f"only the rope_type 'default' for {SLIDING}")
        values["rope_local_theta"] = _theta(config, local, "rope_local_base_freq", local_theta)
    elif by_type[FULL] != by_type[SLIDING]:
        raise config.unsupported(name, rope, "only one for all layers")
    return values


def _theta(config: HFConfig, rope: Mapping[str, Any], old_name: str, default: float) -> float:
    value = rope.get("rope_theta")
    return config.number(old_name, default) if value is None else float(value)


def _scaling(config: HFConfig, name: str, rope: Mapping[str, Any]) -> RopeScaling:
    """The scaling of one section."""
    word = rope.get("rope_type", rope.get("type", "default"))
    if word not in _KINDS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.unsupported(name, rope, "only the rope_type " + ", ".join(map(repr, _KINDS)))
    if word == "default":
        return RopeScaling()
    needed = ("low_freq_factor", "high_freq_factor") if word == "llama3" else ()
    for key in ("factor", *needed):
        if not isinstance(rope.get(key), int | float):
            raise config.unsupported(name, rope, f"only with a number as {key}")
    longest = config.get("max_position_embeddings", 0)
    original = rope.get("original_max_position_embeddings", longest)
    original = config.get("original_max_position_embeddings", original)
    factor = float(rope["factor"])
    if word == "linear":
        return RopeScaling("linear", factor)
    if word == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling("llama3", factor, original, low, high)
    return RopeScaling(
        "yarn", factor, original,
        beta_fast=float(rope.get("beta_fast") or 32), beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True), attention_factor=_yarn_attention(rope),
    )  # fmt: skip


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """RopeScaling.attention_factor: 0, the paper's, where the config says nothing else."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all(scales) or rope["factor"] <= 1:
        return 0.0
    own, all_dims = (0.1 * scale * math.log(rope["factor"]) + 1 for scale in scales)
    return own / all_dims


def rope_config(config: TransformerConfig, two_bases: bool = False) -> dict[str, Any]:
    """Undoes `rope_values`, in the spellings of both transformers.

    Args:
      config: Ours.
      two_bases: Whether the family has a base of its own for layers with a window.
    """
    scaling = _scaling_section(config.rope_scaling)
    rope = {**scaling, "rope_theta": config.rope_theta}
    written = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling.kind == "none" else scaling,
        "rope_parameters": rope,
    }
    if two_bases:
        local = config.rope_local_theta or config.rope_theta
        written["rope_local_base_freq"] = local
        sections = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": local}}
        written["rope_parameters"] = sections
    return written


def _scaling_section(scaling: RopeScaling) -> dict[str, Any]:
    words = {ours: theirs for theirs, ours in _KINDS.items()}
    section: dict[str, Any] = {"rope_type": words[scaling.kind]}
    if scaling.kind == "none":
        return section
    section["factor"] = scaling.factor
    if scaling.kind == "linear":
        return section
    section["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        names: tuple[str, ...] = ("low_freq_factor", "high_freq_factor")
    else:
        names = ("beta_fast", "beta_slow", "truncate")
        if scaling.attention_factor:
            section["attention_factor"] = scaling.attention_factor
    return section | {name: getattr(scaling, name) for name in names}


def layer_types(config: TransformerConfig) -> list[str]:
    """Which layers have a window, as `sliding_layers` reads it."""
    slides = [
        bool(config.window) and i not in config.global_layers for i in range(config.num_layers)
    ]
    return [SLIDING if one else FULL for one in slides]
