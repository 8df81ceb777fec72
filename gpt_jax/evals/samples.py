"""Texts that the model writes while it trains: samples.jsonl."""

from etils import epath

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.text import Generator
from gpt_jax.models.transformer import Transformer
from gpt_jax.runs.config import RunConfig
from gpt_jax.runs.metrics import MetricsLog, NoLog
from gpt_jax.types import Tree

# Somewhat below 1: what a small model says at 1 is noisier than what it knows.
_TEMPERATURE = 0.8


class Samples:
    """Continues the config's prompts, always with the same seed.

    Args:
      path: The samples.jsonl; on resuming, later rows are cut off. None: another process writes it.
      resume_step: The step the run goes on from; None: the file starts anew.
      model: The model.
      tokenizer: Its tokenizer.
      config: The run's config.
    """

    def __init__(
        self,
        path: epath.PathLike | None,
        resume_step: int | None,
        model: Transformer,
        tokenizer: Tokenizer,
        config: RunConfig,
    ):
        self._rows = NoLog() if path is None else MetricsLog(path, resume_step)
        self._model, self._tokenizer = model, tokenizer
        self._prompts = config.train.sample_prompts
        self._sampling = SamplingParams(
            max_tokens=config.train.sample_tokens, temperature=_TEMPERATURE, seed=config.seed
        )

    def run(self, step: int, params: Tree) -> list[tuple[str, str]]:
        """(prompt, continuation) pairs, also written as rows."""
        if not self._prompts:
            return []
        generator = Generator(self._model, params, self._tokenizer)
        completions = generator.complete(self._prompts, self._sampling)
        pairs = [(p, c.text) for p, c in zip(self._prompts, completions, strict=True)]
        for prompt, text in pairs:
            self._rows.write(step, {"prompt": prompt, "text": text})
        return pairs

    def close(self) -> None:
        self._rows.close()
