"""Text to ids and back: bytes, a byte-level BPE, or anyone's tokenizer.json, behind one class."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf

from gpt_jax.data.config import MIN_VOCAB_SIZE
from gpt_jax.data.hashing import write_atomically

EOS_TOKEN = "<|endoftext|>"
# Looked for in this order where a tokenizer.json does not say which token ends a text.
KNOWN_EOS_TOKENS = (
    EOS_TOKEN,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
    "[SEP]",
)
# What may become one token: a word, up to three digits or a run of marks, each with one space
# before it, or a run of white space.  Line ends stay together with the indentation behind them, but
# for its last space, which goes to the word: so " return" is one token wherever it stands.
# On Python's library at 2,048 entries this gives 2.94 bytes a token on held-out modules, GPT-2's
# rule 2.93, and words that may begin with any mark (".name") 2.90.
_PIECES = (
    r" ?\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+[ \t]*(?=[ \t])"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_PIECE_CHARS = 1 << 16


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows which token ends a text.

    Attributes:
      vocab_size: number of ids (V), special tokens included.
      eos_id, eos_token: the token that ends a document and begins the next one.
      fingerprint: sha256 of the tokenizer's JSON form and its end-of-text token.
      cls_id, sep_id: what an encoder's input begins and ends with: [CLS] and [SEP] where the
        vocabulary has them, else the end-of-text token.
      mask_id: [MASK] or <mask>; None where there is none.
      special_tokens: the texts of all special tokens.
      json: its tokenizer.json in one line.
      joinable: encoding a text line by line gives what encoding it whole gives, so long texts
        may be cut.
    """

    def __init__(self, tokenizer: hf.Tokenizer, eos_token: str):
        self._tokenizer = tokenizer
        # A document that quotes "<|endoftext|>" must not end there.  JSON does not keep this.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.eos_token = eos_token
        self.eos_id = tokenizer.token_to_id(eos_token)
        assert self.eos_id is not None, eos_token
        self.cls_id = self._first_id("[CLS]", eos_token)
        self.sep_id = self._first_id("[SEP]", eos_token)
        self.mask_id = self._first_id("[MASK]", "<mask>")
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = tuple(token.content for token in added if token.special)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.json = tokenizer.to_str(pretty=False)
        self.fingerprint = hashlib.sha256(f"{eos_token}\n{self.json}".encode()).hexdigest()
        self.joinable = self.encode("a\n") + self.encode("b") == self.encode("a\nb")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added before or after it.

        Raises:
          ValueError: the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; the work is spread over all cores."""
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                _check_encodable(text)
            raise
        return [item.ids for item in encoded]

    def encode_with_offsets(
        self, text: str, *, parse_special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) of the text that each of them stands for.

        Args:
          text: what to encode.
          parse_special: special tokens that the text spells become those tokens (the text of a
            chat template); otherwise they are text like any other.
        """
        _check_encodable(text)
        self._tokenizer.encode_special_tokens = not parse_special
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        return encoded.ids, encoded.offsets

    def added_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer.json itself puts before and behind a text ("<s>", "[CLS]", ...)."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
        return tuple(ids[:start]), tuple(ids[start + len(bare) :])

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own text; None where the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str | None:
        """A token as its vocabulary spells it; None where there is no such id."""
        return self._tokenizer.id_to_token(token_id)

    def token_text(self, token_id: int) -> str:
        """How a token is written alone, special ones included; for people."""
        special = self._tokenizer.get_added_tokens_decoder().get(int(token_id))
        return special.content if special else self.decode([token_id])

    def _first_id(self, *tokens: str) -> int | None:
        ids = (self.token_id(token) for token in tokens)
        return next((token_id for token_id in ids if token_id is not None), None)

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def streamer(self, before: Sequence[int] = ()) -> "Streamer":
        """Decodes ids as they come; `before` are those of the text that they continue, if any."""
        return Streamer(self, before)

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each id stands for, int32[V]; 0 for special tokens.

        Summed over the targets of a batch this is the denominator of bits per byte, also for a
        part of a corpus.  None where tokens do not stand for bytes (not a byte-level tokenizer).
        """
        if (json.loads(self.json).get("decoder") or {}).get("type") != "ByteLevel":
            return None
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[token_id] = len(piece)  # one character of the byte-level alphabet a byte
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            sizes[token_id] = 0 if token.special else len(token.content.encode())
        return sizes

    def save(self, path) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and Hugging Face's libraries read."""
        write_atomically(path, self._tokenizer.to_str(pretty=True).encode())


class Streamer:
    """Turns ids into text one by one, holding back what the next id may still change."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last complete piece, as context, and what came after it
        self._context = 0
        self._context_text = ""
        # Behind a word the space of the next one is a part of the text, which some decoders take
        # away from the first token; behind a special token or half of a character nothing is.
        last = [int(i) for i in before[-1:]]
        text = tokenizer.decode(last, skip_special_tokens=True)
        if text and not text.endswith("\ufffd"):
            self._ids, self._context, self._context_text = last, 1, text

    def put(self, token_id: int) -> str:
        """The text that became complete with this id; "" inside a character of several bytes."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end: the bytes of an unfinished character show as U+FFFD."""
        return self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> str:
        new = text[len(self._context_text) :]
        # The piece before stays as context: some decoders treat the first token differently.
        if new:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._context_text = self._tokenizer.decode(self._ids)
        return new


def byte_tokenizer(special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """Ids 0..255 are the byte values, 256 is the end of a text, then come other special tokens."""
    byte_chars = _byte_alphabet()
    vocab = {char: byte for byte, char in enumerate(byte_chars)}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[]))
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finish(tokenizer, byte_level, special_tokens)


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = ()
) -> Tokenizer:
    """Learns a byte-level BPE; the same texts give the same tokenizer.

    Args:
      texts: the training text, read once.
      vocab_size: entries wanted; fewer where the text is too small to hold so many pairs.
      special_tokens: entries beside the end-of-text token that no text is encoded to.

    Raises:
      ValueError: vocab_size cannot hold the 256 bytes and the special tokens.
    """
    least = MIN_VOCAB_SIZE + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"data.vocab_size: {vocab_size} is below {least}")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(special_tokens),
        min_frequency=2,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (piece for text in texts for piece in text_pieces(text)), trainer=trainer
    )
    return _finish(tokenizer, _pre_tokenizer(), special_tokens)


def load_tokenizer(path, eos_token: str = "") -> Tokenizer:
    """Reads a Hugging Face tokenizer.json.

    Args:
      path: the file, or a folder that holds a `tokenizer.json`.
      eos_token: the end-of-text token; "" looks for a usual one.

    Raises:
      ValueError: no such file, not a tokenizer, or no end-of-text token in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer: {str(path)!r} does not exist; "
            "give 'bytes', 'bpe' or the path of a tokenizer.json"
        )
    try:
        tokenizer = hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data.tokenizer: {str(path)!r} is no tokenizer.json: {error}") from None
    candidates = (eos_token,) if eos_token else KNOWN_EOS_TOKENS
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            return Tokenizer(tokenizer, token)
    if eos_token:
        raise ValueError(f"data.eos_token: {eos_token!r} is not in the vocabulary of {str(path)!r}")
    raise ValueError(
        f"data.eos_token: {str(path)!r} holds none of {', '.join(KNOWN_EOS_TOKENS)}; "
        "name its end-of-text token"
    )


def text_pieces(text: str) -> Iterator[str]:
    """Cuts a long text at line ends into pieces of at most 65,536 characters.

    The library keeps about a hundred bytes a token while it encodes: a book in one piece would
    cost gigabytes, and only one core would work on it.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start, start + _PIECE_CHARS) + 1
        if end <= start:
            end = start + _PIECE_CHARS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _pre_tokenizer():
    split = hf.pre_tokenizers.Split(hf.Regex(_PIECES), behavior="isolated")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return hf.pre_tokenizers.Sequence([split, byte_level])


def _finish(tokenizer: hf.Tokenizer, pre_tokenizer, special_tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [hf.AddedToken(t, special=True, normalized=False) for t in (EOS_TOKEN, *special_tokens)]
    )
    return Tokenizer(tokenizer, EOS_TOKEN)


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    chars |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [chars[byte] for byte in range(256)]


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: character {error.start} is half of a surrogate pair and cannot be encoded"
        ) from None
