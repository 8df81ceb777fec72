"""Chat templates: Jinja programs that turn messages into text, and where the assistant speaks."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from gpt_jax.data.hashing import digest, write_atomically
from gpt_jax.data.template_sandbox import GENERATION_MARKS, block_tags, compile_template

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A template may print the date.  Training data must not change from day to day.
_TRAINING_TIME = datetime.datetime(2025, 1, 1)
# Tokens that end a turn where a template writes them; a model's own list of ends may lack them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
_TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Unicode keeps these two from ever being characters; they mark the borders of a span.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

Messages = Sequence[Mapping[str, str]]


# What `ChatTemplate.save` writes.
TEMPLATE_FILES = ("chat_template.jinja", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may name.

    Attributes:
      source: the Jinja text.
      name: where it is from; errors begin with it.
      tokens: values of `bos_token`, `eos_token` and the like.
      required: special tokens without which its turns have no borders.
    """

    source: str
    name: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()

    def __post_init__(self):
        try:
            compile_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"tasks.template: {self.name}: line {error.lineno}: {error.message}"
            ) from None

    @classmethod
    def load(cls, path) -> "ChatTemplate":
        """Reads a template.

        Args:
          path: a template; or a tokenizer's folder (or its tokenizer.json), which has it in
            chat_template.jinja or in tokenizer_config.json; a folder without one gets ChatML.

        Raises:
          ValueError: no such file, or it holds no template.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"tasks.template: {str(path)!r} does not exist")
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "tokenizer_config.json"):
            raise ValueError(f"tasks.template: {str(path)!r} is neither template nor tokenizer")
        folder = path if path.is_dir() else path.parent
        config_path = folder / "tokenizer_config.json"
        config = _read_json(folder / "special_tokens_map.json") | _read_json(config_path)
        tokens = {name: _token_text(config.get(name)) for name in _TOKEN_VARIABLES}
        tokens = {name: text for name, text in tokens.items() if text is not None}
        is_template = path.is_file() and path.suffix != ".json"
        source_path = path if is_template else folder / "chat_template.jinja"
        if source_path.is_file():
            try:
                return cls(source_path.read_text(encoding="utf-8"), str(source_path), tokens)
            except UnicodeDecodeError:
                raise ValueError(f"tasks.template: {source_path} is no UTF-8 text") from None
        source = _default_of(config.get("chat_template"), config_path)
        return (
            dataclasses.replace(CHATML, tokens=tokens)
            if source is None
            else cls(source, str(config_path), tokens)
        )

    @property
    def fingerprint(self) -> str:
        """Changes whenever what is rendered may change."""
        return digest("chat_template", self.source, dict(self.tokens))

    def fits(self, tokenizer) -> bool:
        """Whether the tokenizer has the tokens that mark its turns."""
        return all(tokenizer.token_id(token) is not None for token in self.required)

    def turn_ends(self, tokenizer) -> tuple[int, ...]:
        """Ids that end the assistant's turn, beside the model's own."""
        written = (token for token in _TURN_ENDS if token in self.source)
        ids = (tokenizer.token_id(token) for token in written)
        return tuple(i for i in ids if i is not None)

    def save(self, folder) -> None:
        """Writes the two files from which `load` and Hugging Face's libraries read it back."""
        folder = Path(folder)
        source_name, tokens_name = TEMPLATE_FILES
        write_atomically(folder / source_name, self.source.encode())
        tokens = json.dumps(dict(self.tokens), indent=2, ensure_ascii=False)
        write_atomically(folder / tokens_name, tokens.encode())

    def render(self, messages: Messages, add_generation_prompt: bool = False, **extras) -> str:
        """The text of a conversation.

        Args:
          messages: dicts with `role` and `content`.
          add_generation_prompt: ends with what comes before an assistant's turn.
          extras: further variables of the template, such as `tools`.

        Raises:
          ValueError: the template fails or refuses the messages.
        """
        now = datetime.datetime.now()
        return self._render(messages, add_generation_prompt, now, **extras)

    def render_with_spans(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which characters of it the assistant is to write.

        A turn's span goes from behind the generation prompt to the end-of-turn token, which it
        includes.  Templates say what it is by `{% generation %}`; of others it is found by
        rendering the messages before a turn and those up to it.

        Returns:
          (text, [(start, end)] in order).

        Raises:
          ValueError: the template fails, or the text of earlier messages depends on later ones.
        """
        text = self._render(messages, False, _TRAINING_TIME)
        if "generation" in block_tags(self.source):
            return text, self._marked_spans(text, messages)
        return text, [
            self._prefix_span(text, messages, i)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _marked_spans(self, text: str, messages: Messages) -> list[tuple[int, int]]:
        marks = dict(zip(GENERATION_MARKS, (_OPEN, _CLOSE), strict=True))
        first, *parts = self._render(messages, False, _TRAINING_TIME, **marks).split(_OPEN)
        spans, plain = [], first
        for part in parts:
            inside, _, outside = part.partition(_CLOSE)
            spans.append((len(plain), len(plain) + len(inside)))
            plain += inside + outside
        if plain != text:
            raise ValueError(
                f"tasks.template: {self.name}: messages: the template changes the text of a "
                "{% generation %} block, or a message holds U+FDD0 or U+FDD1"
            )
        return [(start, end) for start, end in spans if start < end]

    def _prefix_span(self, text: str, messages: Messages, i: int) -> tuple[int, int]:
        """Characters of turn i, by what the text up to it and with it have in common."""
        before = self._render(messages[:i], True, _TRAINING_TIME)
        after = self._render(messages[: i + 1], False, _TRAINING_TIME)
        if not text.startswith(after):  # some end every text, not every turn, with this token
            after = after.removesuffix(self.tokens.get("eos_token", ""))
        content = messages[i]["content"].strip()
        place = after.find(content, len(before))
        problem = ""
        if not (text.startswith(after) and after.startswith(before)):
            problem = "the text up to this turn changes with what follows, so it cannot be found"
        elif place >= 0 and place + len(content) == len(after):
            problem = "nothing ends this turn, so that a model would not learn to stop"
        if problem:
            raise ValueError(
                f"tasks.template: {self.name}: messages[{i}]: {problem}; mark the assistant's "
                "turns in the template with {% generation %} ... {% endgeneration %}"
            )
        # "<|im_end|>\n" ends with the token, but the line end of "Assistant: yes\n" is the token.
        ends_in_text = place >= 0 and after[place + len(content) :].strip()
        return len(before), len(after.rstrip()) if ends_in_text else len(after)

    def _render(self, messages, add_generation_prompt, now, **extras) -> str:
        try:
            return compile_template(self.source).render(
                {"tools": None, "documents": None, **self.tokens, **extras},
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"tasks.template: {self.name}: messages: template says: {reason}"
            ) from None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tasks.template: {path} is not JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def _token_text(value) -> str | None:
    """A special token in a tokenizer's files is a string, or a dict with its properties."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _default_of(value, path: Path) -> str | None:
    """The template of a tokenizer_config.json: a string, or the "default" of several with names."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        if "default" not in named:
            raise ValueError(
                f"tasks.template: {path} holds the templates {', '.join(map(str, named))}, "
                "none of which is 'default'; give one as a file"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"tasks.template: {path}: chat_template is no text")
    return value


CHATML = ChatTemplate(_CHATML, "the built-in ChatML template", required=CHATML_TOKENS)
