"""Evaluations of a finished run, from its directory alone."""

from etils import epath

from gpt_jax.data.compression import compression_bits_per_byte
from gpt_jax.data.documents import VALIDATION
from gpt_jax.data.pipeline import prepare
from gpt_jax.data.sources import open_source
from gpt_jax.evals.validation import Validation
from gpt_jax.objectives.causal_lm import causal_lm
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.run import open_run


def validation(
    workdir: epath.PathLike, step: int | None, cache_dir: epath.PathLike
) -> dict[str, float]:
    """Means over the whole validation split; see Validation.run."""
    run = open_run(workdir, step)
    data = prepare(run.config.data, cache_dir, run.tokenizer)
    data.check_fingerprints(run.data_fingerprints)
    mesh = make_mesh(MeshConfig())
    # Whole rows for every device, however many there are here.
    batch_size = -(-run.config.train.microbatch_size // mesh.size) * mesh.size
    evaluator = Validation(run.model, causal_lm, data, batch_size, mesh)
    return evaluator.run(run.params, whole=True)


def compression(config: RunConfig, cache_dir: epath.PathLike) -> dict[str, float]:
    """Bits per byte of zlib and lzma on the texts of the validation split."""
    documents = open_source(config.data, VALIDATION, cache_dir)
    return compression_bits_per_byte(text for text in documents if text)
