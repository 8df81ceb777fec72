"""The data of a run, whatever it is trained on: text, corrupted text, or the examples of tasks."""

from typing import Any

from gpt_jax.data.examples import CorruptedRows, Layout
from gpt_jax.data.mixture import Mixture
from gpt_jax.data.pipeline import PreparedData, prepare, prepared
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.objectives.transforms import make_transform, num_positions, row_lengths, special_ids
from gpt_jax.runs.config import RunConfig
from gpt_jax.tasks.prepare import prepare_tasks


def prepare_run(
    config: RunConfig, cache_dir, tokenizer: Tokenizer | None = None, workdir: Any = None
) -> PreparedData:
    """Prepares what a run reads.

    Args:
      config: The run's.
      cache_dir: See data.pipeline.prepare.
      tokenizer: The one a run already keeps.
      workdir: The directory of such a run, which also has its chat template.

    Raises:
      ValueError: Rows are not for this model; see also data.pipeline.prepare,
        tasks.prepare.prepare_tasks and objectives.transforms.special_ids.
    """
    if config.tasks.names:
        data = prepare_tasks(config.tasks, config.data, config.model, cache_dir, tokenizer, workdir)
    else:
        data = prepare(config.data, cache_dir, tokenizer)
        corrupt = _corruption(config, data.tokenizer)
        if corrupt is not None:
            train = {name: corrupt(rows) for name, rows in data.train.parts.items()}
            held_out = {name: corrupt(rows) for name, rows in data.validation.items()}
            label = data.description["name"]
            data = prepared(config.data, label, data.tokenizer, Mixture(train), held_out)
    _check_rows(config.model, data)
    return data


def _check_rows(model: TransformerConfig, data: PreparedData) -> None:
    """Whether each part's rows hold what the model reads beside the tokens."""
    for name, rows in data.train.parts.items():
        fields = rows.batch([0])
        if model.family == "encoder_decoder" and "encoder_tokens" not in fields:
            raise ValueError(
                f"model.family: 'encoder_decoder' has an encoder, but rows of {name!r} hold "
                "nothing for it to read"
            )
        if model.read_prompts_whole and "key_ranks" not in fields:
            raise ValueError(
                f"model.read_prompts_whole: True reads prompts in both directions, but rows of "
                f"{name!r} train left to right alone; set it to False"
            )


def _corruption(config: RunConfig, tokenizer: Tokenizer) -> Any:
    """rows -> corrupted rows; None where the objective takes them as they are."""
    objective, seq_len, family = config.objective, config.data.seq_len, config.model.family
    ids = special_ids(
        objective, seq_len, tokenizer.token_id, tokenizer.eos_id, config.model.start_id
    )
    transform = make_transform(objective, ids, tokenizer.vocab_size, seq_len, family)
    if transform is None:
        return None
    needed = num_positions(objective, seq_len, family)
    if needed > config.model.seq_len:
        raise ValueError(
            f"model.seq_len: {config.model.seq_len} is below the {needed} positions that "
            f"objective.name {objective.name!r} needs for data.seq_len {seq_len}"
        )
    layout = Layout(*row_lengths(objective, seq_len, family))
    return lambda rows: CorruptedRows(rows, transform, layout, config.seed)
