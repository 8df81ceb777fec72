"""All tasks by name."""

import difflib

from gpt_jax.tasks import chat, classification, code, preference, tagging, translation
from gpt_jax.tasks.contract import Task

# Modules with TASKS and from_file(name, path) -> Task.
FAMILIES = {
    "classification": classification,
    "tagging": tagging,
    "translation": translation,
    "code": code,
    "chat": chat,
    "preference": preference,
}
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES.values() for task in family.TASKS}


def find_task(name: str) -> Task:
    """A task by name.

    Args:
      name: One of TASKS, or for one's own data "TASK:DATA" (the task's classes and prompt) or
        "FAMILY:DATA"; DATA is a JSONL file, or a folder with a JSONL file a split.

    Raises:
      ValueError: there is none; the text names the nearest ones.
    """
    kind, _, data = name.partition(":")
    if data and kind in FAMILIES:
        return FAMILIES[kind].from_file(kind, data)
    if kind in TASKS:
        return TASKS[kind].with_data(data) if data else TASKS[kind]
    known = [*TASKS, *(f"{family}:FILE.jsonl" for family in FAMILIES)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise ValueError(f"tasks.names: {name!r} is not a task; there is {', '.join(near)}")
