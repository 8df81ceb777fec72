"""Hugging Face's words for how to generate: their names, defaults and checks.  Starts no JAX."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.decode.sampling_params import SamplingParams

# Where neither the call nor generation_config.json says more (transformers 5).
DEFAULT_NEW_TOKENS = 20
# The rules of a draw, which greedy decoding has none of.
_DRAWS = ("temperature", "top_k", "top_p", "min_p")
# What changes nothing of what is written here, or is another part's (the ids of the model).
_WITHOUT_EFFECT = (
    "use_cache", "cache_implementation", "cache_config", "disable_compile", "compile_config",
    "low_memory", "synced_gpus", "transformers_version", "_from_model_config", "bos_token_id",
    "decoder_start_token_id", "remove_invalid_values", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "is_assistant",
)  # fmt: skip
# Their other names: the value that asks for nothing, and what to do instead.
_REFUSED = {
    "attention_mask": (None, "give a list of rows, each of its own length"),
    "bad_words_ids": (None, "give complete() a logit_bias of -100"),
    "sequence_bias": (None, "give complete() a logit_bias"),
    "suppress_tokens": (None, "give complete() a logit_bias of -100"),
    "begin_suppress_tokens": (None, ""),
    "forced_bos_token_id": (None, ""),
    "forced_eos_token_id": (None, ""),
    "prefix_allowed_tokens_fn": (None, "see decode.constraints"),
    "logits_processor": (None, ""),
    "stopping_criteria": (None, "stop_strings and eos_token_id end a text"),
    "max_time": (None, ""),
    "typical_p": (1.0, "see top_p and min_p"),
    "epsilon_cutoff": (0.0, "see top_p and min_p"),
    "eta_cutoff": (0.0, "see top_p and min_p"),
    "top_h": (None, "see top_p and min_p"),
    "renormalize_logits": (False, ""),
    "num_beam_groups": (1, ""),
    "diversity_penalty": (0.0, ""),
    "constraints": (None, "see decode.constraints"),
    "force_words_ids": (None, ""),
    "penalty_alpha": (None, ""),
    "dola_layers": (None, ""),
    "guidance_scale": (None, ""),
    "encoder_repetition_penalty": (1.0, ""),
    "encoder_no_repeat_ngram_size": (0, ""),
    "exponential_decay_length_penalty": (None, ""),
    "watermarking_config": (None, ""),
    "output_scores": (False, "return_dict_in_generate=True gives log-probabilities"),
    "output_logits": (False, "return_dict_in_generate=True gives log-probabilities"),
    "output_attentions": (False, ""),
    "output_hidden_states": (False, ""),
    "assistant_early_exit": (None, ""),
    "inputs_embeds": (None, ""),
}


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How `generate` is asked to continue; names, defaults and meaning are Hugging Face's.

    Attributes:
      max_length: Most tokens with the prompt (an encoder_decoder's: with the start token).
      max_new_tokens: Most tokens without; wins over max_length.
      min_length, min_new_tokens: Fewest, likewise.
      do_sample: Draw, and not the most likely token.
      num_return_sequences: Continuations of each prompt.
      num_beams: Beams of a beam search; 1: none.
      temperature, top_k, top_p, min_p: Rules of a draw (see SamplingParams).
      repetition_penalty: See SamplingParams.
      no_repeat_ngram_size: SamplingParams' no_repeat_ngram.
      length_penalty, early_stopping: See decode.beam.
      eos_token_id: Ids that end a text, in the place of the model's; -1: none does.
      pad_token_id: What fills shorter rows; None: the first id that ends a text.
      stop_strings: Strings that end a text; they are part of it.
      prompt_lookup_num_tokens: Tokens that are proposed from what the text holds already.
      num_assistant_tokens: Tokens that an assistant_model proposes at once.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    num_return_sequences: int = 1
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    prompt_lookup_num_tokens: int | None = None
    num_assistant_tokens: int = 4

    def __post_init__(self):
        for name in ("max_length", "max_new_tokens", "prompt_lookup_num_tokens"):
            self._at_least(name, 1, optional=True)
        for name in ("num_return_sequences", "num_beams", "num_assistant_tokens"):
            self._at_least(name, 1)
        self._at_least("min_length", 0)
        self._at_least("min_new_tokens", 0, optional=True)
        if self.do_sample and not self.temperature > 0:
            right = "above 0; do_sample=False always takes the most likely token"
            raise ValueError(f"temperature: {self.temperature!r} is not {right}")
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("num_beams: a beam search that draws is not supported")
        most = self.num_beams if not self.do_sample else self.num_return_sequences
        if self.num_return_sequences > most:
            raise ValueError(
                f"num_return_sequences: {self.num_return_sequences} is above num_beams {most}, and "
                "the most likely token is one; draw with do_sample=True"
            )

    def _at_least(self, name: str, least: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {value!r} is not an integer of at least {least}")

    @property
    def stop(self) -> tuple[str, ...]:
        """stop_strings as a tuple."""
        strings = self.stop_strings
        return (strings,) if isinstance(strings, str) else tuple(strings or ())

    @property
    def end_ids(self) -> tuple[int, ...] | None:
        """The call's own eos_token_id as a tuple; None: the model's."""
        ids = self.eos_token_id
        if ids is None:
            return None
        return tuple(i for i in ([ids] if isinstance(ids, int) else ids) if i >= 0)

    def new_tokens(self, length: int, room: int) -> tuple[int, int]:
        """Fewest and most new tokens.

        Args:
          length: Tokens that max_length counts before the first new one.
          room: New tokens that the model's context has a place for.

        Raises:
          ValueError: max_length is not above length.
        """
        most = self.max_new_tokens
        if most is None and self.max_length is None:
            # Their default alone gives way to the context; what is asked for is told.
            most = min(DEFAULT_NEW_TOKENS, max(1, room))
        elif most is None:
            most = self.max_length - length
            if most <= 0:
                raise ValueError(
                    f"max_length: {self.max_length} is not above the {length} tokens of the "
                    "prompt, which it counts; give max_new_tokens"
                )
        fewest = self.min_new_tokens
        fewest = max(0, self.min_length - length) if fewest is None else fewest
        return min(fewest, most), most

    def sampling(self, fewest: int, most: int, seed: int) -> SamplingParams:
        """The same in our words, for decoding without beams.

        Raises:
          ValueError: A value is not allowed; the message names our field.
        """
        drawn = {name: getattr(self, name) for name in _DRAWS}
        ends = {} if self.end_ids is None else {"ignore_eos": True, "stop_ids": self.end_ids}
        return SamplingParams(
            max_tokens=most, min_tokens=fewest, n=self.num_return_sequences, seed=seed,
            repetition_penalty=self.repetition_penalty, no_repeat_ngram=self.no_repeat_ngram_size,
            stop=self.stop, **(drawn if self.do_sample else {"temperature": 0.0}), **ends,
        )  # fmt: skip


def generate_options(given: Mapping[str, Any], folder: Mapping[str, Any]) -> GenerateOptions:
    """What holds for a call: what it says, then generation_config.json, then the defaults.

    Args:
      given: The call's arguments; None: not said.
      folder: Values of generation_config.json.

    Raises:
      ValueError: No such name, one that is not supported, or a value that is not allowed.
    """
    names = {field.name for field in dataclasses.fields(GenerateOptions)}
    chosen = {}
    for values, where in ((folder, "generation_config.json: "), (given, "")):
        for name, value in values.items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name in names:
                chosen[name] = value
            elif name in _REFUSED:
                _refuse(name, value, where)
            elif not where:
                raise ValueError(f"{name}: generate has no such argument")
    if "max_length" in given and "max_new_tokens" not in given:
        # Not the file's, though without a word in the call it would win.
        chosen.pop("max_new_tokens", None)
    # Ids that end a text are known to the model already.
    if given.get("eos_token_id") is None:
        chosen.pop("eos_token_id", None)
    options = GenerateOptions(**chosen)
    ignored = [name for name in _DRAWS if given.get(name) is not None]
    if ignored and not options.do_sample:
        warnings.warn(f"{ignored[0]}: ignored, as do_sample is False", stacklevel=3)
    return options


def _refuse(name: str, value: Any, where: str) -> None:
    neutral, instead = _REFUSED[name]
    if neutral is not None and isinstance(value, int | float) and value == neutral:
        return
    told = f"{name}: {value!r} is not supported" + (f"; {instead}" if instead else "")
    if not where:
        raise ValueError(told)
    # A model's habit, not this caller's wish: it can be used without, but not in silence.
    warnings.warn(f"{where}{told}", stacklevel=4)
