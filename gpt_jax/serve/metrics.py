"""Numbers for Prometheus: how long requests take, how many run, what was generated."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500,
)  # fmt: skip
# Name in the engine's stats -> metric and what it says.
_GAUGES = {
    "running": ("gpt_jax_requests_running", "Requests that have a slot."),
    "waiting": ("gpt_jax_requests_waiting", "Requests that wait for a slot."),
    "slots": ("gpt_jax_slots", "Texts that can be generated at the same time."),
    "free_slots": ("gpt_jax_free_slots", "Slots that nobody uses."),
}
_COUNTERS = {
    "cached_tokens": ("gpt_jax_cached_prompt_tokens", "Prompt tokens that were not read again."),
    "prefix_hits": ("gpt_jax_prefix_hits", "Prompts of which a beginning was known."),
    "programs": ("gpt_jax_programs", "Programs compiled, or read from disk, for requests."),
}


class Metrics:
    """One server's; each has a registry of its own, so several may live in a process."""

    def __init__(self):
        self._registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

        self._ttft = histogram(
            "gpt_jax_time_to_first_token_seconds", "From acceptance to a text's first token."
        )
        self._inter_token = histogram(
            "gpt_jax_inter_token_seconds", "Between two tokens of a text."
        )
        self._end_to_end = histogram("gpt_jax_e2e_seconds", "From acceptance to a text's end.")
        self._queue = histogram(
            "gpt_jax_queue_seconds", "From acceptance until a slot is given to a prompt."
        )
        self._prompt = Counter(
            "gpt_jax_prompt_tokens", "Tokens of accepted prompts.", registry=self._registry
        )
        self._generation = Counter(
            "gpt_jax_generation_tokens", "Tokens generated.", registry=self._registry
        )
        self._finished = Counter(
            "gpt_jax_finished", "Texts that ended.", ["reason"], registry=self._registry
        )
        self._responses = Counter(
            "gpt_jax_http_responses", "Answers by status.", ["status"], registry=self._registry
        )
        self._gauges = {
            key: Gauge(name, text, registry=self._registry) for key, (name, text) in _GAUGES.items()
        }
        self._counters = {
            key: Counter(name, text, registry=self._registry)
            for key, (name, text) in _COUNTERS.items()
        }
        self._seen: dict[str, int] = {}

    def queued(self, seconds: float) -> None:
        """A prompt got its slot."""
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A text has begun."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens came, one in so many seconds."""
        for _ in range(count):
            self._inter_token.observe(seconds)

    def prompt(self, count: int) -> None:
        """A prompt of so many tokens was accepted."""
        self._prompt.inc(count)

    def generated(self, count: int) -> None:
        """So many tokens were generated."""
        self._generation.inc(count)

    def finished(self, reason: str, seconds: float) -> None:
        """A text ended."""
        self._finished.labels(reason).inc()
        self._end_to_end.observe(seconds)

    def cancelled(self) -> None:
        """A request's client went away, or it took too long."""
        self._finished.labels("cancelled").inc()

    def responded(self, status: int) -> None:
        """An answer began."""
        self._responses.labels(str(status)).inc()

    def text(self, stats: dict[str, int]) -> bytes:
        """Everything, in Prometheus' format; `stats` are the engine's."""
        for key, gauge in self._gauges.items():
            gauge.set(stats.get(key, 0))
        for key, counter in self._counters.items():
            # A new engine counts from zero again.
            new, seen = stats.get(key, 0), self._seen.get(key, 0)
            counter.inc(new - seen if new >= seen else new)
            self._seen[key] = new
        return generate_latest(self._registry)
