"""Conversations: the assistant's turns are what is learned.

Row: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
Its record holds the template's text of the whole; the loss counts "Hello." and the token that ends
the turn. There is no score but the loss.
"""

from gpt_jax.data.chat import encode_chat
from gpt_jax.tasks.contract import Task
from gpt_jax.tasks.data_spec import DataSpec


def _encode(row, tokenizer, template, seq_len, where):
    return encode_chat(row.get("messages"), tokenizer, template, seq_len, where)


def from_file(name: str, path: str) -> Task:
    """A task of one's own conversations."""
    return Task(name, DataSpec(path), metric="loss", encode=_encode)


TASKS = (from_file("chat_en", "alpaca_en"), from_file("chat_zh", "alpaca_zh"))
