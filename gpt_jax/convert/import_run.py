"""A run directory made of a Hugging Face or GGUF source."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils import epath

from gpt_jax import trees
from gpt_jax.convert.merge import merge_strict
from gpt_jax.convert.open_model import generation_values
from gpt_jax.convert.placing import place
from gpt_jax.convert.source import Source, inherit_model, load_params, model_values, tokenizer_path
from gpt_jax.convert.tokenizer_files import GENERATION
from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.data.tokenizers import load_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.parallel.cache_folder import cache_dir
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs import canonical
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import save_params
from gpt_jax.runs.config import RunConfig, run_config
from gpt_jax.runs.receipt import session, write_json, write_receipt
from gpt_jax.runs.state import abstract_on_mesh
from gpt_jax.types import Tree

# What a model of this family and head is trained for, as far as that needs no task.
_OBJECTIVES = {
    ("decoder", "lm"): "causal_lm",
    ("encoder_decoder", "lm"): "span_corruption",
    ("encoder", "mlm"): "masked_lm",
}
_SEQ_LEN = 256


def import_run(spec: str, to: epath.PathLike, skip: Iterable[str] = ()) -> RunConfig:
    """Writes a run directory with the source's model, tokenizer and chat template, at step 0.

    Args:
      spec: "hf:DIR" or "gguf:FILE".
      to: A new or empty folder.
      skip: Patterns of parameters of the source that the model of its head has no place for.

    Raises:
      ValueError: The source cannot be represented or read, is no language model, or `to` holds
        files.
    """
    to = epath.Path(to)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to: {str(to)!r} is not empty; give a new folder")
    source = Source.parse(spec)
    if source.kind == "run":
        raise ValueError(f"--from: {spec!r} is a run already")
    config = _config(spec)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = make_mesh(MeshConfig())
    # Stacked as a checkpoint has them, so that they are written as they lie.
    stacked = dataclasses.replace(config.model, scan=True)
    params = _params(spec, config.model, abstract_on_mesh(Transformer(stacked), mesh), skip)
    to.mkdir(parents=True, exist_ok=True)
    tokenizer.save(to / layout.TOKENIZER)
    template = ChatTemplate.load(config.data.tokenizer)
    if template.name != CHATML.name:  # its own, not what those without one get
        template.save(to)
    folder = Path(config.data.tokenizer).parent
    generation = generation_values(folder if source.kind == "gguf" else source.path)
    if generation:
        write_json(to / GENERATION, generation)
    save_params(to / layout.CHECKPOINTS, params, {"data": {}})
    facts = {"source": spec, "parameters": trees.num_elements(params)}
    write_receipt(to / layout.RECEIPT, facts, session(mesh, 0), anew=True)
    write_json(to / layout.CONFIG, config.to_dict())  # the last: it makes the folder a run
    return config


def _config(spec: str) -> RunConfig:
    values: dict[str, Any] = model_values(spec)
    objective = _OBJECTIVES.get((values["family"], values["head"]))
    if objective is None:
        raise ValueError(
            f"--from: {spec} is an {values['family']} with the head {values['head']!r}, no "
            "language model; a finetuning takes it by init.source"
        )
    return run_config(
        inherit_model(
            {
                "seed": 0,
                "data": {
                    "tokenizer": str(tokenizer_path(spec, cache_dir())),
                    "seq_len": min(_SEQ_LEN, values["seq_len"]),
                },
                "objective": {"name": objective},
                "init": {"source": spec},
                "train": {"batch_size": 1, "duration": 1},
            }
        )
    )


def _params(spec: str, config: TransformerConfig, like: Tree, skip: Iterable[str]) -> Tree:
    """The parameters on the mesh; none may be new."""
    used, new = merge_strict(load_params(spec, config), canonical.stacked_target(like), skip, spec)
    if new:
        raise ValueError(f"--skip: {', '.join(new)} would be missing from the run")
    return place(used, like)
