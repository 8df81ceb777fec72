"""A model to use, wherever it is from: a run directory, a folder of Hugging Face's, a GGUF file."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from gpt_jax.convert.json_files import read_json
from gpt_jax.convert.merge import merge_strict
from gpt_jax.convert.naming import renamed, source_names
from gpt_jax.convert.placing import place
from gpt_jax.convert.source import Source, load_params, model_values, tokenizer_path
from gpt_jax.convert.tokenizer_files import GENERATION
from gpt_jax.data.chat_template import CHATML, ChatTemplate
from gpt_jax.data.infill_tokens import InfillTokens, known_infill_tokens, trained_infill_tokens
from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.models.config import WEIGHT_DTYPES, TransformerConfig
from gpt_jax.models.quantize import quantize, to_bfloat16
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.transforms import special_ids
from gpt_jax.parallel.cache_folder import cache_dir
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs import canonical
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.run import open_run
from gpt_jax.runs.state import abstract_on_mesh
from gpt_jax.tasks.table import find_task
from gpt_jax.types import Tree

# Values of config.json that are another file's in newer folders.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model and what belongs to it.

    Attributes:
      name: The last part of its path.
      model: `model.apply({"params": params}, ...)`; `model.config` is its TransformerConfig.
      params: Without Flax's boxes, on the mesh.
      tokenizer: Its tokenizer.
      prefix_ids, suffix_ids: What it is used to before and behind a text: the end-of-text token
        before it for what was trained here, what tokenizer.json says for the others.
      eos_ids: Ids that end what it writes.
      chat_template: None where it has none of its own.
      generation: Values of generation_config.json.
      labels: Names of its classes, where they have any.
      infill: How it is asked for the text before a suffix; None: it was not trained for that. A
        run says so by its objective, other models by the tokens they have.
      trained_here: Whether it read what data.packing and tasks.encode make of texts; the others,
        and runs that are an imported model as it was, read what their own tokenizer makes.
    """

    name: str
    model: Transformer
    params: Tree
    tokenizer: Tokenizer
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    generation: dict[str, Any]
    labels: tuple[str, ...]
    infill: InfillTokens | None = None
    trained_here: bool = False


def open_model(
    spec: str,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    field: str = "spec",
) -> OpenModel:
    """Reads a model.

    Args:
      spec: A run directory, "hf:DIR", "gguf:FILE", or a folder of Hugging Face's as it is.
      step: A run's checkpoint; None: its best or newest.
      mesh: Where the parameters go; None: all devices, along data.
      field: What the caller calls the spec: an option, "--run", or an argument.

    Raises:
      ValueError: There is no model, or one that cannot be represented; the text begins with
        `field`, or with the name of `step`.
    """
    names = source_names(field) | {"--step": "--step" if field.startswith("--") else "step"}
    with renamed(names):
        return _opened(spec, step, mesh)


def _opened(spec: str, step: int | None, mesh: jax.sharding.Mesh | None) -> OpenModel:
    if _is_hf_folder(spec):
        spec = f"hf:{spec}"
    source = Source.parse(spec)
    if source.kind == "run":
        return _open_run(source.path, step, mesh)
    if step is not None:
        raise ValueError(f"--step: {step} is for run directories; {spec!r} has one state")
    config = TransformerConfig(**model_values(spec))
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    model = Transformer(config, mesh.devices.flat[0].platform)
    loaded = load_params(spec, config)  # the first: it tells a config that is not the tensors'
    like = abstract_on_mesh(model, mesh)
    target = canonical.stacked_target(like)
    # A bare BERT has a pooler, which only its head for classes reads.
    has_pooler = any(name.startswith("pooler/") for name in loaded)
    unread = ("^pooler/",) if config.head == "none" and has_pooler else ()
    used, new = merge_strict(loaded, target, unread, spec)
    assert not new, new
    params = place(used, like)
    path = tokenizer_path(spec, cache_dir())
    tokenizer = load_tokenizer(path)
    folder = source.path if source.kind == "hf" else Path(path).parent
    own, generation = read_json(folder / "config.json"), generation_values(folder)
    labels = own.get("id2label") or {}
    if not (isinstance(labels, dict) and all(str(key).isdecimal() for key in labels)):
        raise ValueError(f"init.source: {folder}/config.json: id2label has no numbers and names")
    prefix, suffix = tokenizer.added_ids()
    return OpenModel(
        name=source.path.name, model=model, params=params, tokenizer=tokenizer,
        prefix_ids=prefix, suffix_ids=suffix, eos_ids=_eos_ids(generation, tokenizer),
        chat_template=_template(folder), generation=generation,
        labels=tuple(str(labels[key]) for key in sorted(labels, key=int)),
        infill=known_infill_tokens(tokenizer.token_id) if config.family == "decoder" else None,
    )  # fmt: skip


def held_as(opened: OpenModel, dtype: str) -> OpenModel:
    """The model with its weights rounded to one of WEIGHT_DTYPES.

    In bfloat16 it computes in bfloat16, too; int8 are weights alone (models.quantize).

    Raises:
      ValueError: The dtype is none of these, or the model has no such form.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: {dtype!r} is none of {', '.join(WEIGHT_DTYPES)}")
    if dtype == "int8":
        return dataclasses.replace(opened, params=quantize(opened.params))
    if dtype == "bfloat16":
        config = dataclasses.replace(opened.model.config, dtype=dtype)
        model = opened.model.clone(config=config)
        return dataclasses.replace(opened, model=model, params=to_bfloat16(opened.params))
    return opened


def generation_values(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder, with what older ones say of it in config.json."""
    own = read_json(folder / "config.json")
    return {**{k: own[k] for k in SPECIAL_IDS if k in own}, **read_json(folder / GENERATION)}


def _open_run(path, step: int | None, mesh) -> OpenModel:
    run = open_run(path, step, mesh=mesh)
    config, tokenizer = run.model.config, run.tokenizer
    imported = run.step == 0 and run.config.init.source.startswith(("hf:", "gguf:"))
    generation = read_json(run.workdir / GENERATION) if imported else {}
    # What data.packing and tasks.encode put around a text.
    prefix, suffix = {
        "decoder": ((tokenizer.eos_id,), ()),
        "encoder": ((tokenizer.cls_id,), (tokenizer.sep_id,)),
        "encoder_decoder": ((), (tokenizer.eos_id,)),
    }[config.family]
    if imported:
        prefix, suffix = tokenizer.added_ids()
    return OpenModel(
        name=run.workdir.name, model=run.model, params=run.params, tokenizer=tokenizer,
        prefix_ids=prefix, suffix_ids=suffix, eos_ids=_eos_ids(generation, tokenizer),
        chat_template=_template(run.workdir), generation=generation, labels=_labels(run.config),
        infill=infill_tokens(run.config, tokenizer, imported), trained_here=not imported,
    )  # fmt: skip


def infill_tokens(config: RunConfig, tokenizer: Tokenizer, imported: bool) -> InfillTokens | None:
    """How a run's model is asked for the text before a suffix; None: it was not trained for that.

    Args:
      config: The run's.
      tokenizer: The run's.
      imported: Whether its parameters are those of a model of another's, as they were.
    """
    objective = config.objective
    if imported and config.model.family == "decoder":
        return known_infill_tokens(tokenizer.token_id)
    if objective.name != "fill_in_the_middle":
        # Runs share tokenizers, so that the tokens alone say nothing.
        return None
    ids = special_ids(objective, config.data.seq_len, tokenizer.token_id, tokenizer.eos_id)
    return trained_infill_tokens(ids.infilling, objective.fim_rate, objective.fim_spm_rate)


def _labels(config: RunConfig) -> tuple[str, ...]:
    """Names of a run's classes, where the data of its task are still there to say them."""
    if config.model.head not in ("sequence", "tokens") or not config.tasks.names:
        return ()
    try:
        labels = tuple(find_task(config.tasks.names[0]).labels)
    except (ValueError, OSError):  # its own files, which have gone
        return ()
    return labels if len(labels) == config.model.num_classes else ()


def _is_hf_folder(spec: str) -> bool:
    config = Path(spec).expanduser() / "config.json"
    return config.is_file() and "model" not in read_json(config)


def _template(folder) -> ChatTemplate | None:
    template = ChatTemplate.load(folder)
    return None if template.name == CHATML.name else template


def _eos_ids(generation: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    # Configs may hold ids of another vocabulary: a class's defaults.
    known = [i for i in ids if isinstance(i, int) and 0 <= i < tokenizer.vocab_size]
    return tuple(known) or (tokenizer.eos_id,)
