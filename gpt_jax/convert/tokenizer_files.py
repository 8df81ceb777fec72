"""A tokenizer.json for sources that hold a tokenizer in another form.  Starts no JAX."""

import json
import warnings
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

from gpt_jax.convert.gguf_file import GGUF
from gpt_jax.convert.json_files import read_json
from gpt_jax.data.hashing import digest, write_atomically

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
GENERATION = "generation_config.json"
# GGUF's words for how a byte-level BPE cuts text -> the steps before the bytes.
_PRE_TOKENIZERS = {
    "gpt-2": (),
    "smollm": (pre_tokenizers.Digits(individual_digits=True),),
}
# Metadata that have the names of generation_config.json.
_GENERATION_IDS = ("bos_token_id", "eos_token_id")
# GGUF's kinds of tokens.
_CONTROL, _USER_DEFINED = 3, 4


def hf_tokenizer(folder: Path, cache_dir) -> Path:
    """The tokenizer.json of a Hugging Face folder, or one made from its vocabulary files.

    Raises:
      ValueError: The folder holds neither.
    """
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    settings = read_json(folder / "tokenizer_config.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / "vocab.txt").is_file():
        made_of = [folder / "vocab.txt"]
        tokenizer = hf.BertWordPieceTokenizer(
            str(folder / "vocab.txt"),
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
    elif vocab.is_file() and merges.is_file():
        made_of = [vocab, merges]
        tokenizer = hf.ByteLevelBPETokenizer(str(vocab), str(merges))
        special = _special_tokens(folder) or ["<|endoftext|>"]
        known = [token for token in special if tokenizer.token_to_id(token) is not None]
        tokenizer.add_special_tokens(known)
    else:
        raise ValueError(
            f"init.source: {folder} holds no {TOKENIZER}, no vocab.txt and no vocab.json with "
            f"merges.txt; save its tokenizer as {TOKENIZER}"
        )
    path = _folder(cache_dir, *made_of) / TOKENIZER
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    names = " and ".join(file.name for file in made_of)
    warnings.warn(f"{folder} holds no {TOKENIZER}; {path} is made of {names}", stacklevel=2)
    return path


def _special_tokens(folder: Path) -> list[str]:
    """What special_tokens_map.json names: texts, dicts with a text as `content`, lists of them."""
    said = read_json(folder / "special_tokens_map.json").values()
    flat = [one for value in said for one in (value if isinstance(value, list) else [value])]
    return [str(one.get("content") if isinstance(one, dict) else one) for one in flat]


def gguf_tokenizer(file: GGUF, cache_dir) -> Path:
    """A tokenizer.json made of a GGUF's metadata, with what it says of chats and ends beside it.

    Raises:
      ValueError: Another kind of tokenizer than a byte-level BPE whose splitting we know.
    """
    pre = file.metadata("tokenizer.ggml.pre")
    for key, known in (("model", ("gpt2",)), ("pre", tuple(_PRE_TOKENIZERS))):
        value = file.metadata(f"tokenizer.ggml.{key}")
        if value not in known:
            raise ValueError(
                f"init.source: {file.where}: tokenizer.ggml.{key} {value!r} is not supported, only "
                + ", ".join(known)
            )
    folder = _folder(cache_dir, Path(file.where))
    write_atomically(folder / TOKENIZER, _byte_level(file, pre).to_str(pretty=True).encode())
    template = file.metadata("tokenizer.chat_template")
    if template is not None:
        write_atomically(folder / CHAT_TEMPLATE, template.encode())
    ids = {name: file.metadata(f"tokenizer.ggml.{name}") for name in _GENERATION_IDS}
    ids = {name: int(token_id) for name, token_id in ids.items() if token_id is not None}
    if ids:
        write_atomically(folder / GENERATION, json.dumps(ids).encode())
    return folder / TOKENIZER


def _byte_level(file: GGUF, pre: str) -> hf.Tokenizer:
    tokens = file.metadata("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in file.metadata("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = hf.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    prefix = file.metadata("tokenizer.ggml.add_space_prefix", False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*_PRE_TOKENIZERS[pre], pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, file.metadata("tokenizer.ggml.token_type"), strict=True):
        if kind in added:
            added[kind].append(hf.AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(added[_CONTROL])
    tokenizer.add_tokens(added[_USER_DEFINED])
    return tokenizer


def _folder(cache_dir, *files: Path) -> Path:
    """Where what is made of these files is kept."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Path(cache_dir) / "tokenizers" / f"imported-{digest(stats)}"
