"""Which tasks a run is trained and judged on: a frozen, validated dataclass.  Starts no JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """A task, or a mixture of several; none: the run trains on the text of its corpus.

    Attributes:
      names: Of tasks.table.TASKS, or "FAMILY:FILE.jsonl" for one's own rows.
      weights: Share of each task in training; (): by size, temperature and cap.
      temperature: Sizes are taken to the power 1 / temperature (arXiv:1910.10683, section 3.5.2).
      cap: No task counts for more examples than this; 0: no cap.
      limit: Training examples of each task, evenly over its file; 0: all.
      source_len: Tokens of an encoder's input (S); 0: data.seq_len.
      eval_examples: Validation examples of each task while training; 0: all. The last evaluation
        takes all.
      max_new_tokens: Of an answer that is generated; 0: the task's own.
      pack: Whether several examples share a row.
      template: Chat template file; "": the tokenizer's own, else ChatML.
    """

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    temperature: float = 1.0
    cap: int = 0
    limit: int = 0
    source_len: int = 0
    eval_examples: int = 200
    max_new_tokens: int = 0
    pack: bool = True
    template: str = ""

    def __post_init__(self):
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"tasks.names: {list(self.names)} names a task twice")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(
                f"tasks.weights: {list(self.weights)} are {len(self.weights)} numbers for "
                f"{len(self.names)} tasks"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"tasks.weights: {list(self.weights)} are not all above 0")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"tasks.temperature: {self.temperature!r} is not above 0")
        for name in ("cap", "limit", "source_len", "eval_examples", "max_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"tasks.{name}: {getattr(self, name)!r} is below 0")
