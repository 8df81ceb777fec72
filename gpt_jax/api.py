"""The Python interface: a model and its tokenizer as one object, by Hugging Face's names.

    import gpt_jax

    model = gpt_jax.from_pretrained("runs/quickstart")
    ids = model.encode("def ")
    out = model.generate(ids, max_length=50, num_return_sequences=3, do_sample=True)
    print(model.decode(out[0], skip_special_tokens=True))

docs/python_api.md has the table of names, defaults and differences.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.convert.export_run import export_run
from gpt_jax.convert.naming import renamed
from gpt_jax.convert.open_model import OpenModel, held_as, open_model
from gpt_jax.data.chat_template import Messages
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.decode import write as writing
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.hf_generate import (
    Generated,
    counted,
    ends_of,
    generate_rows,
    pieces,
    put_into,
    stream_ids,
)
from gpt_jax.decode.hf_options import generate_options
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.evals import classify as labels
from gpt_jax.evals import embed as vectors
from gpt_jax.evals.text_scores import TextScore, score_texts
from gpt_jax.models.config import TransformerConfig
from gpt_jax.parallel.startup import start

# A text, or its ids.
Input = str | Sequence[int] | np.ndarray
# Of an answer, as in Hugging Face's pipeline.
_CHAT_TOKENS = 256


def from_pretrained(spec: str, *, step: int | None = None, dtype: str = "float32") -> "Model":
    """Opens a model.

    Args:
      spec: A run directory, a folder of Hugging Face's, "hf:DIR" or "gguf:FILE" ("hf:NAME" and
        "gguf:NAME" are models that `gpt-jax data fetch` brought).
      step: A run's checkpoint; None: its best or newest.
      dtype: Of the weights: "float32", "bfloat16" (half of the memory; computes in it, too) or
        "int8" (a quarter). docs/generation.md tells which is fast where.

    Raises:
      ValueError: There is no model, or one that cannot be represented.
    """
    start()
    opened = held_as(open_model(str(spec), step=step), dtype)
    return Model(opened, spec=str(spec), step=step)


class Model:
    """A model with its tokenizer.

    Attributes:
      opened: What was read: Flax model, parameters, tokenizer, ids and template.
    """

    def __init__(self, opened: OpenModel, *, spec: str = "", step: int | None = None):
        """
        Args:
          opened: The model.
          spec, step: Where it was read from, for save_pretrained.
        """
        self.opened = opened
        self._spec, self._step = spec, step

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.num_layers} layers of {c.embed_dim}, vocabulary {c.vocab_size}"
        return f"{self.name}: {c.family}, {sizes}, context {c.seq_len}"

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.opened.name

    @property
    def config(self) -> TransformerConfig:
        """The architecture."""
        return self.opened.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; its own `encode` adds nothing to a text."""
        return self.opened.tokenizer

    @property
    def generation_config(self) -> dict[str, Any]:
        """Values of generation_config.json, the defaults of generate."""
        return self.opened.generation

    @property
    def eos_token_id(self) -> int:
        """The first of the ids that end a text."""
        return self.opened.eos_ids[0]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens that it spells become those tokens, as in Hugging Face's.

        Args:
          text: The text.
          add_special_tokens: With what the model is used to before and behind a text.
        """
        ids = self.tokenizer.encode_with_offsets(text, parse_special=True)[0]
        if not add_special_tokens:
            return ids
        return [*self.opened.prefix_ids, *ids, *self.opened.suffix_ids]

    def decode(self, ids: int | Sequence[int] | np.ndarray, skip_special_tokens=False) -> str:
        """Text of ids."""
        return self.tokenizer.decode(np.atleast_1d(ids), skip_special_tokens)

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens=False) -> list[str]:
        """Text of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = False, tokenize: bool = True,
        **extras: Any,
    ) -> list[int] | str:  # fmt: skip
        """A conversation as the model's chat template writes it: ids, or text without `tokenize`.

        Raises:
          ValueError: The model has no chat template, or it refuses the messages.
        """
        template = writing.template_of(self.opened)
        text = template.render(messages, add_generation_prompt, **extras)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def generate(
        self,
        inputs: Input | Sequence[Input],
        *,
        seed: int | None = None,
        stream: bool = False,
        streamer: Any = None,
        assistant_model: "Model | None" = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> np.ndarray | Generated | Iterator[str]:
        """Continues prompts; names, defaults and meaning of the options are Hugging Face's.

        Args:
          inputs: A text, ids, or a list or array of them, of any lengths. A text is encoded with
            special tokens; ids are read as they are.
          seed: The same one gives the same text; None: another one each time.
          stream: Gives the pieces of one continuation's text as they come.
          streamer: An object with put(ids) and end(), such as Hugging Face's; put gets the prompt
            first and then each new token.
          assistant_model: Proposes tokens, which are checked several at once: the same text,
            sooner.
          return_dict_in_generate: Gives log-probabilities too.
          **options: As in decode.hf_options.GenerateOptions.

        Returns:
          int32[n * num_return_sequences, T]: prompt and continuation (an encoder_decoder's: start
          token and answer), filled up on the right.

        Raises:
          ValueError: An option or a prompt is not allowed; the message names it.
        """
        rows = self._rows(inputs)
        chosen = generate_options(options, self.generation_config)
        seed = secrets.randbits(32) if seed is None else seed
        draft = None if assistant_model is None else assistant_model.opened
        if not (stream or streamer is not None):
            generated = generate_rows(
                self.opened, rows, chosen, seed=seed, draft=draft, make_engine=self._engine
            )
            return generated if return_dict_in_generate else generated.sequences
        ids = stream_ids(
            self.opened, rows, chosen, seed=seed, draft=draft, make_engine=self._engine
        )
        if streamer is not None:
            return put_into(streamer, counted(self.opened, rows)[0], ids)
        return pieces(self.tokenizer, ids, ends_of(self.opened, chosen))

    def complete(self, prompt: Input, **asked: Any) -> str | list[str]:
        """As completions, but the texts alone: one, or a list of them with n."""
        texts = [completion.text for completion in self.completions(prompt, **asked)]
        return texts if "n" in asked else texts[0]

    def completions(
        self,
        prompt: Input,
        *,
        suffix: str = "",
        json_schema: dict | str = "",
        regex: str = "",
        grammar: str = "",
        seed: int | None = None,
        **sampling: Any,
    ) -> list[writing.Whole]:
        """As complete, with tokens, log-probabilities and why each text ended.

        Args:
          prompt: A text or ids.
          suffix: What is to stand behind the new text, for models that fill in the middle.
          json_schema, regex, grammar: What the text must be like, one of them.
          seed: None: another one each time.
          **sampling: As in decode.sampling_params.SamplingParams.

        Raises:
          ValueError: A value or the prompt is not allowed.
        """
        opened = self.opened
        ids = self.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
        ends = ()
        sampling = {name: _frozen(value) for name, value in sampling.items()}
        if suffix:
            text = prompt if isinstance(prompt, str) else self.decode(prompt)
            ids, ends = writing.prompt_of(opened, text, suffix=suffix)
            sampling["stop_ids"] = (*sampling.get("stop_ids", ()), *ends)
        seed = secrets.randbits(32) if seed is None else seed
        params = SamplingParams(seed=seed, **sampling)
        forms = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        constraint = writing.constraint_of(opened, ends=ends, **forms)
        way, ids = writing.Way(constraint=constraint), ids or [opened.eos_ids[0]]
        return writing.whole(writing.write(opened, ids, params, way, continues=True), params.n)

    def chat(self, messages: Messages | str, *, stream: bool = False, **options: Any):
        """The assistant's next turn as text; generate's options, but for max_new_tokens=256.

        Args:
          messages: Dicts with `role` and `content`; a text is one turn of the user.
          stream: Gives it piece by piece.
          **options: As generate's.

        Raises:
          ValueError: The model has no chat template, a message spells a special token, or as
            generate.
        """
        for name in ("num_return_sequences", "return_dict_in_generate", "streamer"):
            if options.get(name) not in (None, False, 1):
                raise ValueError(f"{name}: {options[name]!r} is for generate; chat gives one text")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids, ends = writing.chat_prompt(self.opened, messages)
        options.setdefault("eos_token_id", (*self.opened.eos_ids, *ends))
        if not {"max_length", "max_new_tokens"} & set(options):
            options["max_new_tokens"] = _CHAT_TOKENS
        if stream:
            return self.generate(ids, stream=True, **options)
        (row,) = self.generate(ids, **options)
        return self.decode(row[len(ids) :], skip_special_tokens=True)

    def score(
        self, texts: str | Sequence[str], contexts: str | Sequence[str] | None = None
    ) -> TextScore | list[TextScore]:
        """Log-probabilities of each token of texts; see evals.text_scores."""
        if isinstance(texts, str):
            return score_texts(self.opened, [texts], None if contexts is None else [contexts])[0]
        return score_texts(self.opened, texts, contexts)

    def embed(self, texts: str | Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Vectors of length 1, f32[n, D]; [D] of one text. See evals.embed."""
        if isinstance(texts, str):
            return vectors.embed(self.opened, [texts])[0]
        return vectors.embed(self.opened, texts, batch_size)

    def classify(self, texts, top_k: int | None = 1, function_to_apply: str | None = None):
        """Classes of texts, in the form of Hugging Face's pipeline "text-classification".

        Args:
          texts: A text, a dict of `text` and `text_pair`, or a list of them.
          top_k: How many of the best classes; None: all. With a value that is not 1, a list a text.
          function_to_apply: "softmax", "sigmoid" or "none"; None: sigmoid of a single class, else
            softmax.

        Returns:
          [{"label": ..., "score": ...}] a text.

        Raises:
          ValueError: The model has another head, or a text is too long.
        """
        return labels.as_pipeline(self.opened, texts, top_k=top_k, function=function_to_apply)

    __call__ = classify

    def save_pretrained(self, folder: str, dtype: str = "float32") -> None:
        """Writes a folder that Hugging Face's transformers reads to the same model.

        Args:
          folder: A new or empty one.
          dtype: "float32" or "bfloat16"; of the weights as they were read, not as they are held.

        Raises:
          ValueError: No family of theirs has this model, or the folder holds files.
        """
        if not self._spec:
            raise ValueError("save_pretrained: the model was not read from anywhere")
        with renamed({"--from": "save_pretrained", "--to": "folder", "--dtype": "dtype"}):
            export_run(self._spec, folder, step=self._step, dtype=dtype)

    def _engine(self, num_texts: int) -> Engine:
        """One of its own for each call: two streams may be read in turns."""
        opened = self.opened
        return Engine(
            opened.model, opened.params, vocab_size=self.tokenizer.vocab_size,
            eos_ids=opened.eos_ids, max_slots=min(num_texts, writing.MAX_SLOTS),
        )  # fmt: skip

    def _rows(self, inputs: Input | Sequence[Input]) -> list[list[int]]:
        if isinstance(inputs, str):
            return [self.encode(inputs)]
        if len(inputs) and isinstance(inputs[0], int | np.integer):
            return [_ids(inputs)]
        return [self.encode(row) if isinstance(row, str) else _ids(row) for row in inputs]


def _ids(row: Sequence[int] | np.ndarray) -> list[int]:
    """A row of ids as integers."""
    ids = np.asarray(row)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError("inputs: a row is a text or a list of ids")
    return ids.tolist()


def _frozen(value: Any) -> Any:
    """A value as SamplingParams takes it: a text is one stop string, a dict is pairs."""
    if isinstance(value, Mapping):
        return tuple(value.items())
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(tuple(each) if isinstance(each, list) else each for each in value)
    return value
