"""Preferences: of two answers to a prompt the better one, for DPO (arXiv:2305.18290).

Row: {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}; each may be text or messages.
Its record holds prompt and chosen answer as segment 1, prompt and rejected answer as segment 2.
"""

from gpt_jax.data.chat import encode_preference
from gpt_jax.tasks.contract import Task
from gpt_jax.tasks.data_spec import DataSpec


def _encode(row, tokenizer, template, seq_len, where):
    # A base model knows no turns: its answers are texts behind the prompt.
    template = template if template.fits(tokenizer) else None
    return encode_preference(row, tokenizer, template, seq_len, where)


def from_file(name: str, path: str) -> Task:
    """A task of one's own pairs."""
    return Task(name, DataSpec(path), metric="accuracy", encode=_encode, packs=False)


TASKS = (
    from_file("preference_en", "llamafactory_dpo_en"),
    from_file("preference_zh", "llamafactory_dpo_zh"),
)
