"""The files beside the weights from which transformers reads a model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import processors

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.chat_template import CHATML_TOKENS

# Looked for where no config names one.
_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_UNKNOWNS = ("[UNK]", "<unk>")


def special_ids(opened: OpenModel) -> dict[str, Any]:
    """Ids for config.json and generation_config.json; null where there is no such token."""
    config = opened.model.config
    end = _end_ids(opened)
    ids: dict[str, Any] = {
        "bos_token_id": _bos_id(opened),
        "eos_token_id": end[0] if len(end) == 1 else end,
        "pad_token_id": _pad_id(opened),
    }
    if config.family == "encoder_decoder":
        start = config.start_id
        ids["decoder_start_token_id"] = start if start >= 0 else opened.tokenizer.eos_id
    return ids


def write_tokenizer(folder: Path, opened: OpenModel) -> None:
    """tokenizer.json, tokenizer_config.json and, where there is a chat template, that.

    The tokenizer puts the ids around a text that the model is used to: what our own models are
    trained with is not in a run's tokenizer.json, which only cuts text.
    """
    tokenizer, config = opened.tokenizer, opened.model.config
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    if tokenizer.added_ids() != (opened.prefix_ids, opened.suffix_ids):
        theirs = hf.Tokenizer.from_file(str(path))
        theirs.post_processor = _around(opened)
        theirs.save(str(path))
    ids = {
        "bos_token": _bos_id(opened),
        "eos_token": opened.eos_ids[0],
        "pad_token": _pad_id(opened),
        "unk_token": _first_id(opened, _UNKNOWNS),
    }
    if config.family == "encoder":
        ids |= {"cls_token": tokenizer.cls_id, "sep_token": tokenizer.sep_id}
        ids["mask_token"] = tokenizer.mask_id
    known = {name: i for name, i in ids.items() if i is not None and i < tokenizer.vocab_size}
    names = {name: tokenizer.token_text(i) for name, i in known.items()}
    inputs = ["input_ids", "attention_mask"]
    if config.num_token_types:
        inputs.insert(1, "token_type_ids")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False, "model_input_names": inputs, **names,
    }  # fmt: skip
    if opened.chat_template is not None:
        # Newer versions read the file, older ones the setting.
        settings["chat_template"] = opened.chat_template.source
        (folder / "chat_template.jinja").write_text(opened.chat_template.source)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")


def _around(opened: OpenModel) -> processors.PostProcessor:
    """Puts prefix_ids before and suffix_ids behind a text; an encoder's pair shares the prefix."""
    tokenizer, config = opened.tokenizer, opened.model.config
    before = [_piece(tokenizer.token_text(i)) for i in opened.prefix_ids]
    behind = [_piece(tokenizer.token_text(i)) for i in opened.suffix_ids]
    second = ":1" if config.num_token_types > 1 else ":0"
    pair = [*before, "$A", *behind, f"$B{second}", *(f"{piece}{second}" for piece in behind)]
    used = dict.fromkeys((*opened.prefix_ids, *opened.suffix_ids))
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=pair,
        special_tokens=[(tokenizer.token_text(i), i) for i in used],
    )


def _piece(token: str) -> str:
    assert not token.startswith("$"), token
    return token


def _end_ids(opened: OpenModel) -> list[int]:
    """eos_ids, and what ends a turn in ChatML."""
    template, mark = opened.chat_template, CHATML_TOKENS[1]
    turn = opened.tokenizer.token_id(mark) if template and mark in template.source else None
    return list(dict.fromkeys([*opened.eos_ids, *(() if turn is None else (turn,))]))


def _bos_id(opened: OpenModel) -> int | None:
    if opened.model.config.family == "decoder" and len(opened.prefix_ids) == 1:
        return opened.prefix_ids[0]
    return _said(opened, "bos_token_id")


def _pad_id(opened: OpenModel) -> int | None:
    config, said = opened.model.config, _said(opened, "pad_token_id")
    found = _first_id(opened, _PADS) if said is None else said
    if found is not None or (config.family == "decoder" and config.head == "sequence"):
        # A decoder's head for classes reads the last token that is no padding, which the end of a
        # text is not.
        return found
    return opened.eos_ids[0]


def _said(opened: OpenModel, name: str) -> int | None:
    """An id of the source's own configs, which may hold a class's defaults."""
    value = opened.generation.get(name)
    known = isinstance(value, int) and 0 <= value < opened.model.config.vocab_size
    return value if known else None


def _first_id(opened: OpenModel, tokens: tuple[str, ...]) -> int | None:
    ids = (opened.tokenizer.token_id(token) for token in tokens)
    return next((i for i in ids if i is not None), None)
