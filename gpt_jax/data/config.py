"""What a run reads: a corpus, how to hold some of it out, and how to cut it into rows."""

import dataclasses
import difflib
import re

from gpt_jax.data.corpora import CORPORA

# The first needs neither a network nor a file; `gpt-jax data fetch` brings the others.
NAMED_CORPORA = ("python_stdlib", *CORPORA)
INVALID_UTF8_POLICIES = ("error", "skip", "replace")
MIN_VOCAB_SIZE = 257  # 256 byte values and the end of a text
_TFDS_NAME = re.compile(r"\w+(/[\w.+-]+)?:\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Names a corpus, its held-out part, its tokenizer and the row length.

    Attributes:
      name: a named corpus ("python_stdlib", or one of corpora.py), several joined by "+", or a
        TFDS dataset "name[/config]:version".
      path: own data, wins over `name`: a text file, a .jsonl file, a .npy file of token rows,
        or a folder of one of these kinds, or a folder that TFDS prepared.
      pattern: glob of the files in a folder, relative to it; its ending also tells the kind.
      field: where a JSONL row or a TFDS example holds its text.
      train_split, validation_split: TFDS splits, slices such as "train[:99%]" included; of a
        corpus of corpora.py: "train", "validation" or "test".
      validation_path: own validation data, of any kind that `path` may be.
      validation_fraction: share held out where no validation data is named.
      train_tokens: tokens of the training split that are used, drawn evenly by whole rows; those
        of a smaller number are among those of a larger; 0: all.
      on_invalid_utf8: "error", "skip" (drops and counts the whole document) or "replace".
      tokenizer: "bytes", "bpe" (trained on the train split) or a path to a tokenizer.json.
      vocab_size: entries of a BPE to be trained, the end-of-text token included.
      special_tokens: entries of a trained vocabulary that no text is encoded to, such as "<mask>".
      eos_token: end-of-text token of a tokenizer.json that does not hold a usual one.
      seq_len: tokens in a row (T).

    Raises:
      ValueError: a value is out of range; the message names the field.
    """

    name: str = "python_stdlib"
    path: str = ""
    pattern: str = "**/*.txt"
    field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    validation_path: str = ""
    validation_fraction: float = 0.05
    train_tokens: int = 0
    on_invalid_utf8: str = "error"
    tokenizer: str = "bpe"
    vocab_size: int = 2048
    special_tokens: tuple[str, ...] = ()
    eos_token: str = ""
    seq_len: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        if not self.path:
            _check_name(self.name)
        for field in ("pattern", "field", "train_split", "validation_split", "tokenizer"):
            if not getattr(self, field):
                raise ValueError(f"data.{field}: '' is empty; give a value or leave the default")
        if self.eos_token and self.tokenizer in ("bpe", "bytes"):
            raise ValueError(
                f"data.eos_token: {self.eos_token!r} is for a tokenizer.json; "
                f"data.tokenizer {self.tokenizer!r} has its own"
            )
        if self.path and self.path == self.validation_path:
            raise ValueError(
                f"data.validation_path: {self.path!r} is data.path too; "
                "leave it empty to hold out a part of data.path"
            )
        if not 0.0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"data.validation_fraction: {self.validation_fraction} is out of range; "
                "it must be above 0 and at most 0.5"
            )
        if self.train_tokens < 0:
            raise ValueError(f"data.train_tokens: {self.train_tokens} is below 0 (all)")
        if self.on_invalid_utf8 not in INVALID_UTF8_POLICIES:
            raise ValueError(
                f"data.on_invalid_utf8: {self.on_invalid_utf8!r} is not one of "
                + ", ".join(INVALID_UTF8_POLICIES)
            )
        if not MIN_VOCAB_SIZE <= self.vocab_size <= 2**24:
            raise ValueError(
                f"data.vocab_size: {self.vocab_size} is out of range; "
                f"it must be from {MIN_VOCAB_SIZE} (256 bytes and end of text) to {2**24}"
            )
        if not 1 <= self.seq_len <= 2**24:
            raise ValueError(
                f"data.seq_len: {self.seq_len} is out of range; it must be from 1 to {2**24}"
            )


def _check_type(name, value, kind):
    if kind == tuple[str, ...]:
        kind = tuple
    ok = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if isinstance(value, bool) or not ok:
        raise ValueError(f"data.{name}: {value!r} is a {type(value).__name__}, not {kind.__name__}")


def _check_name(name):
    parts = name.split("+")
    if all(part in NAMED_CORPORA for part in parts) or _TFDS_NAME.fullmatch(name):
        return
    if not name:
        raise ValueError("data.name: '' names no corpus; give data.name or data.path")
    for part in parts:
        close = difflib.get_close_matches(part, NAMED_CORPORA, n=1, cutoff=0.7)
        if part not in NAMED_CORPORA and (close or len(parts) > 1):
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"data.name: {part!r} is not a named corpus{meant}")
    if ":" not in name:
        raise ValueError(
            f"data.name: {name!r} has no version; write '{name}:1.0.0' with the version that is "
            "prepared, or a named corpus ('gpt-jax data fetch' lists them)"
        )
    raise ValueError(f"data.name: {name!r} is not of the form 'name[/config]:major.minor.patch'")
