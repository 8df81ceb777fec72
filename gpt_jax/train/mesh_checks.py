"""Whether a run fits its mesh: what each axis splits must be there, and in whole parts."""

from jax.sharding import Mesh

from gpt_jax.objectives.config import WITH_TEACHER
from gpt_jax.objectives.transforms import row_lengths
from gpt_jax.parallel import sharding
from gpt_jax.runs.config import RunConfig


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError, naming the field, unless the config's run can be split as the mesh says.

    Args:
      config: The run's.
      mesh: Made of config.mesh: its sizes are known.
    """
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, mesh)
    if mesh.shape["sequence"] > 1:
        _check_sequence(config, mesh.shape["sequence"])
    if mesh.shape["expert"] > 1:
        _check_expert(config, mesh.shape["expert"])
    if mesh.shape["stage"] > 1:
        _check_stage(config, mesh.shape["stage"])


def _check_sequence(config: RunConfig, size: int) -> None:
    name = config.model.attention
    if name not in ("auto", "chunked"):
        raise ValueError(
            f"model.attention: {name!r} does not attend over mesh.sequence {size}; 'auto' and "
            "'chunked' do"
        )
    lengths = row_lengths(config.objective, config.data.seq_len, config.model.family)
    for length in lengths:
        if length % size:
            became = f", which makes rows of {length}," if length != config.data.seq_len else ""
            raise ValueError(
                f"data.seq_len: {config.data.seq_len}{became} is not a multiple of mesh.sequence "
                f"{size}"
            )
    if config.tasks.source_len % size:
        raise ValueError(
            f"tasks.source_len: {config.tasks.source_len} is not a multiple of mesh.sequence {size}"
        )


def _check_expert(config: RunConfig, size: int) -> None:
    number = config.model.num_experts
    if not number or number % size:
        instead = "" if number else "; without experts use mesh.data or mesh.fsdp"
        raise ValueError(f"mesh.expert: {size} does not divide model.num_experts {number}{instead}")


def _check_stage(config: RunConfig, size: int) -> None:
    model = config.model
    if not model.scan:
        raise ValueError(f"model.scan: False has no stacked layers for mesh.stage {size} to split")
    if model.num_layers % size:
        raise ValueError(f"mesh.stage: {size} does not divide model.num_layers {model.num_layers}")
    if model.family == "encoder_decoder":
        raise ValueError(f"model.family: 'encoder_decoder' does not run on mesh.stage {size}")
    if model.num_experts:
        raise ValueError(
            f"model.num_experts: {model.num_experts} experts a layer do not run on mesh.stage "
            f"{size}; use mesh.expert"
        )
    if model.lora_rank:  # its targets are paths, which a stage's layers do not have
        raise ValueError(
            f"model.lora_rank: {model.lora_rank} adapters do not run on mesh.stage {size}"
        )
    if config.objective.name in WITH_TEACHER:
        raise ValueError(
            f"objective.name: {config.objective.name!r} has a second model, which does not run on "
            f"mesh.stage {size}"
        )
    decodes = (model.family, model.head) == ("decoder", "lm")
    for name, value in (
        ("train.sample_prompts", config.train.sample_prompts),
        ("tasks.names", config.tasks.names),
    ):
        if decodes and value:
            raise ValueError(
                f"{name}: {value} takes decoding, which does not run on mesh.stage {size}; leave "
                "it empty and evaluate the run on another mesh"
            )
