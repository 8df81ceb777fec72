"""`init.source`: where a run's first parameters are from.  Starts no JAX.

"hf:DIR" is a folder of Hugging Face's, "gguf:FILE" a GGUF file; everything else is a run directory.
"hf:minilm" and "gguf:smollm2" are the models of data.model_packages, once they are fetched.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gpt_jax.convert import table
from gpt_jax.convert.bert import BERT, HEADS_OF
from gpt_jax.convert.gemma import GEMMA, GEMMA2, GEMMA3
from gpt_jax.convert.gguf_file import GGUF, LLAMA_GGUF
from gpt_jax.convert.gpt2 import GPT2
from gpt_jax.convert.hf_config import HFConfig, read_hf_config
from gpt_jax.convert.json_files import read_json
from gpt_jax.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from gpt_jax.convert.t5 import T5, T5_ENCODER
from gpt_jax.convert.tensors import Renamed, SafeTensors
from gpt_jax.convert.tokenizer_files import gguf_tokenizer, hf_tokenizer
from gpt_jax.data.model_packages import MODELS, model_folder
from gpt_jax.models.config import RopeScaling, TransformerConfig
from gpt_jax.parallel.cache_folder import cache_dir

_DECODERS = {
    "Llama": LLAMA, "Mistral": MISTRAL, "Qwen2": QWEN2, "Qwen3": QWEN3, "SmolLM3": SMOLLM3,
    "Gemma": GEMMA, "Gemma2": GEMMA2,
}  # fmt: skip
# The class that wrote the weights -> its family.
ARCHITECTURES = {
    "GPT2LMHeadModel": GPT2,
    "GPT2Model": GPT2,
    "GPT2ForSequenceClassification": GPT2,
    **{f"{name}ForCausalLM": family for name, family in _DECODERS.items()},
    **{f"{name}ForSequenceClassification": family for name, family in _DECODERS.items()},
    **{f"{name}Model": family for name, family in _DECODERS.items()},
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3TextForSequenceClassification": GEMMA3,
    "Gemma3TextModel": GEMMA3,
    **dict.fromkeys(HEADS_OF, BERT),
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "T5EncoderModel": T5_ENCODER,
    "MT5EncoderModel": T5_ENCODER,
}
# Where config.json names no class.
_MODEL_TYPES = {
    "gpt2": GPT2, "bert": BERT, "t5": T5, "mt5": T5, "gemma3_text": GEMMA3,
    **{name.lower(): family for name, family in _DECODERS.items()},
}  # fmt: skip
# Another value of these computes something else with the same parameters.
_SAME = (
    "family", "positions", "rope_theta", "rope_scaling", "rope_local_theta", "unrotated_layers",
    "window", "global_layers", "relative_max_distance", "norm", "norm_order", "norm_eps",
    "activation", "scale_attention", "score_width", "attention_softcap", "logit_softcap",
    "scale_embedding", "scale_logits",
)  # fmt: skip
# The same of fields that are 0 where a source does not have them: older runs, other libraries.
_SAME_OR_NONE = ("mup_base_width", "mup_base_head_dim", "mup_base_layers")


@dataclasses.dataclass(frozen=True)
class Source:
    """A parsed `init.source`.

    Attributes:
      kind: "hf", "gguf" or "run".
      path: Its folder or file; a run may lie wherever epath reaches.
    """

    kind: str
    path: Path | epath.Path

    @classmethod
    def parse(cls, spec: str) -> "Source":
        """Reads "hf:DIR", "gguf:FILE" or the path of a run directory.

        Raises:
          ValueError: The path is empty, or a run is named where there is none.
        """
        kind, colon, path = spec.partition(":")
        if colon and kind in ("hf", "gguf"):
            if not path:
                raise ValueError(f"init.source: {spec!r} names no path")
            return cls(kind, _packaged(kind, path))
        folder = epath.Path(spec).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"init.source: {spec!r} is no run directory; give one, hf:DIR or gguf:FILE"
            )
        if "model" not in read_json(folder / "config.json"):
            raise ValueError(
                f"init.source: {spec!r} is no run directory; for a folder of Hugging Face's "
                f"write 'hf:{spec}'"
            )
        return cls("run", folder)


def _packaged(kind: str, path: str) -> Path:
    """The path, or the fetched model of that name where there is no such path."""
    place = Path(path).expanduser()
    if place.exists() or path not in MODELS:
        return place
    folder = model_folder(path, cache_dir())
    return next(folder.glob("*.gguf"), folder) if kind == "gguf" else folder


def model_values(spec: str) -> dict[str, Any]:
    """Fields of TransformerConfig that the source's model has.

    Raises:
      ValueError: There is no such source, or its model is one we cannot represent; the message
        names the setting and its value.
    """
    source = Source.parse(spec)
    if source.kind == "run":
        return json.loads((source.path / "config.json").read_text())["model"]
    return _open(source)[2]


def inherit_model(values: dict[str, Any], workdir: Path | None = None) -> dict[str, Any]:
    """A config's values with the model section completed from `init.source`.

    Args:
      values: The config's.
      workdir: The run directory; a run that is in it is continued with what it has, and its source
        may be gone.

    Raises:
      ValueError: There is no such source, or its model cannot be represented.
    """
    source = values.get("init", {}).get("source", "")
    if not source:
        return values
    kept = workdir / "config.json" if workdir else None
    if kept and kept.is_file() and any((workdir / "checkpoints").glob("[0-9]*")):
        run = json.loads(kept.read_text())
        data = {"tokenizer": run["data"]["tokenizer"], **values.get("data", {})}
        return {**values, "data": data, "model": {**run["model"], **values.get("model", {})}}
    inherited = dict(model_values(source))
    if "tokenizer" not in values.get("data", {}):
        # Its ids are what the parameters know.
        tokenizer = str(tokenizer_path(source, cache_dir()))
        values = {**values, "data": {**values.get("data", {}), "tokenizer": tokenizer}}
    # How the source's run was computed, and adapters that are merged when it is read.
    for name in ("scan", "remat", "attention", "lora_rank", "lora_alpha", "lora_targets"):
        inherited.pop(name, None)
    own = values.get("model", {})
    if "head" in own and "num_classes" not in own:
        inherited.pop("num_classes", None)
    return {**values, "model": {**inherited, **own}}


def load_params(spec: str, config: TransformerConfig) -> dict[str, table.Parameter]:
    """The parameters of a Hugging Face or GGUF source, f32, by canonical path.

    Args:
      spec: "hf:DIR" or "gguf:FILE".
      config: Of the model that they are for. Sizes and heads may differ: `merge_strict` judges
        those.

    Raises:
      ValueError: The model's config computes something else than the source's, or a tensor is
        missing, unused or of another shape than the source's own config says.
    """
    source = Source.parse(spec)
    assert source.kind != "run", "runs.run.open_run reads runs"
    family, tensors, values = _open(source)
    check_same(values, config, spec)
    return table.read_params(family, values, tensors)


def check_same(values: Mapping[str, Any], config: TransformerConfig, where: str) -> None:
    """Refuses a config with which the source's parameters would compute something else.

    Raises:
      ValueError: Names the field with both values.
    """
    values = dict.fromkeys(_SAME_OR_NONE, 0) | dict(values)
    for name in (*_SAME, *_SAME_OR_NONE):
        if name not in values:
            continue
        ours, theirs = getattr(config, name), values[name]
        if isinstance(ours, RopeScaling):
            theirs = RopeScaling(**theirs)
        elif isinstance(ours, tuple):  # a list in JSON
            theirs = tuple(theirs)
        if ours != theirs:
            raise ValueError(f"model.{name}: {ours!r} in the config, but {where} has {theirs!r}")


def tokenizer_path(spec: str, cache_folder) -> Path | epath.Path:
    """A tokenizer.json: the source's own, or one made of its files and kept in the cache.

    A chat template that a GGUF file holds is put beside it as chat_template.jinja.
    """
    source = Source.parse(spec)
    if source.kind == "gguf":
        return gguf_tokenizer(_gguf(source.path), cache_folder)
    if source.kind == "hf":
        return hf_tokenizer(source.path, cache_folder)
    return source.path / "tokenizer.json"


def _open(source: Source) -> tuple[table.Family, Renamed, dict[str, Any]]:
    where = str(source.path if source.kind == "gguf" else source.path / "config.json")
    try:
        if source.kind == "gguf":
            tensors = _gguf(source.path)
            family, config = LLAMA_GGUF, tensors.hf_config()
        else:
            config = read_hf_config(source.path)
            config.need("quantization_config", None)
            family, tensors = _family(config), SafeTensors(source.path)
        renamed = table.named_as_in_table(family, config, tensors)
        values = table.model_values(family, config, renamed)
        TransformerConfig(**values)  # what the file says may not go together
    except ValueError as error:  # ours, a field of TransformerConfig's, or float("x")'s
        if str(error).startswith("init.source: "):
            raise
        raise ValueError(f"init.source: {where}: {error}") from error
    except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
        told = f"a value is of a kind that it cannot be: {error}"
        raise ValueError(f"init.source: {where}: {told}") from error
    return family, renamed, values


# To go through the metadata takes seconds: every token is a field.
@functools.lru_cache(maxsize=1)
def _gguf(path: Path) -> GGUF:
    return GGUF(path)


def _family(config: HFConfig) -> table.Family:
    name, known = config.architecture, ARCHITECTURES
    if not name:
        name, known = config.model_type, _MODEL_TYPES
    if name not in known:
        what = "architectures" if config.architecture else "model_type"
        raise config.unsupported(what, name, "only " + ", ".join(known))
    return known[name]
