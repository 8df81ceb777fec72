"""What a server may be told, and the limits that keep one request from hurting the others."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
      host: The address to listen at; only this machine reaches the default.
      port: 0 takes a free one.
      aliases: Names besides the model's own under which clients may ask for it.
      api_keys: A file of keys, one a line; "": everybody is let in.
      cors_origins: Web origins whose pages may call this server; none by default.
      slots: Texts that are generated at the same time.
      max_waiting: Prompts that may wait for a slot; more are refused with 429.
      max_requests: HTTP requests that may be in work at the same time; more are refused with 429.
      warm_up: What first requests need is compiled at the start, before /health says 200; without
        it, when they come.
      prefill_chunk: Prompt tokens that are read between two steps of the running texts.
      prefix_cache_tokens: Tokens of earlier prompts whose keys and values are kept, of 124M's size
        73 KiB each; 0: none.
      max_body_bytes: The longest body of a request; longer ones are refused with 413.
      max_tokens: Most tokens of one text; 0: as many as the context has.
      max_input_tokens: Most tokens of a text that becomes a vector; 0: those of the context. It
        is read in one piece, whose memory grows with the square of its length.
      max_n: The largest n and best_of.
      max_prompts: Most prompts of one request, and most inputs of one call for embeddings.
      max_choices: Most texts of one request: prompts times the larger of n and best_of.
      head_timeout_s: How long a request's head may take to arrive.
      body_timeout_s: How long a body may take to arrive.
      request_timeout_s: How long an answer may take.
      template_timeout_s: How long a chat template may run.
      drain_timeout_s: How long running answers may go on after SIGTERM.
      stall_timeout_s: /health fails where one step takes longer.

    Raises:
      ValueError: a value is not allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    aliases: tuple[str, ...] = ()
    api_keys: str = ""
    cors_origins: tuple[str, ...] = ()
    slots: int = 8
    max_waiting: int = 128
    max_requests: int = 512
    warm_up: bool = True
    prefill_chunk: int = 512
    prefix_cache_tokens: int = 4096
    max_body_bytes: int = 4 << 20
    max_tokens: int = 0
    max_input_tokens: int = 2048
    max_n: int = 16
    max_prompts: int = 128
    max_choices: int = 256
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    template_timeout_s: float = 2.0
    drain_timeout_s: float = 30.0
    stall_timeout_s: float = 120.0

    def __post_init__(self):
        if not (isinstance(self.host, str) and self.host):
            raise ValueError(f"host: {self.host!r} is not an address")
        least = {
            "port": 0, "slots": 1, "max_waiting": 0, "max_requests": 1, "prefill_chunk": 1,
            "prefix_cache_tokens": 0, "max_body_bytes": 1, "max_tokens": 0,
            "max_input_tokens": 0, "max_n": 1, "max_prompts": 1, "max_choices": 1,
        }  # fmt: skip
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}: {value!r} is not an integer of at least {lowest}")
        if not isinstance(self.warm_up, bool):
            raise ValueError(f"warm_up: {self.warm_up!r} is not true or false")
        if self.port > 65535:
            raise ValueError(f"port: {self.port} is not at most 65535")
        for field in dataclasses.fields(self):
            if field.name.endswith("_timeout_s"):
                value = getattr(self, field.name)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (number and math.isfinite(value) and value > 0):
                    raise ValueError(f"{field.name}: {value!r} is not a number of seconds above 0")
        for name in ("aliases", "cors_origins"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)):
                raise ValueError(f"{name}: {value!r} is not a tuple of names")
