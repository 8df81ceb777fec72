"""From an objective to what it does to a row of tokens, and the special tokens that this takes."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from gpt_jax.data import spans
from gpt_jax.data.infilling import fill_in_the_middle
from gpt_jax.data.masking import masked_lm
from gpt_jax.data.permutation import num_predicted, permutation_lm
from gpt_jax.data.prefixes import prefix_lm
from gpt_jax.objectives.config import ObjectiveConfig

# (row of T + 1 tokens, or fewer at the end of a corpus; what chance there is) -> record
Transform = Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]]

_MASK = "<mask>"
_INFILLING = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
# What others call the same token.
_ALSO = {
    _MASK: ("[MASK]",),
    "<|fim_prefix|>": ("<fim_prefix>",),
    "<|fim_suffix|>": ("<fim_suffix>",),
    "<|fim_middle|>": ("<fim_middle>",),
}
# Tokens that stand for no text, where a tokenizer has them.
_NO_TEXT = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>", "<unk>", "<cls>", "<sep>")


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens; -1 and () where the objective needs none.

    Attributes:
      eos: Ends a document and begins the next.
      start: What the decoder of an encoder-decoder starts from.
      mask: Stands for a hidden token.
      sentinels: Stand for removed spans, first to last.
      infilling: Before prefix, suffix and middle.
      no_text: Others that are neither hidden nor predicted.
    """

    eos: int
    start: int
    mask: int = -1
    sentinels: tuple[int, ...] = ()
    infilling: tuple[int, ...] = ()
    no_text: tuple[int, ...] = ()

    @property
    def all(self) -> np.ndarray:
        """Every one of them, sorted."""
        ids = {self.eos, self.start, self.mask, *self.sentinels, *self.infilling, *self.no_text}
        return np.array(sorted(ids - {-1}))


def needed_tokens(config: ObjectiveConfig, seq_len: int) -> tuple[str, ...]:
    """The special tokens that an objective takes, e.g. to give a new tokenizer.

    Args:
      config: The objective.
      seq_len: Tokens of a row (T), which decide how many spans it has.
    """
    if config.name in ("masked_lm", "permutation_lm"):
        return (_MASK,)
    if config.name == "fill_in_the_middle":
        return _INFILLING
    if config.name == "span_corruption":
        _, number = spans.num_noise_and_spans(seq_len, config.mask_rate, config.mean_span)
        return tuple(f"<extra_id_{i}>" for i in range(number))
    return ()


def special_ids(
    config: ObjectiveConfig,
    seq_len: int,
    token_id: Callable[[str], int | None],
    eos_id: int,
    start_id: int = -1,
) -> SpecialIds:
    """Finds the ids of `needed_tokens`.

    Args:
      config: The objective.
      seq_len: Tokens of a row (T).
      token_id: The tokenizer's: a token's id, or None.
      eos_id: The tokenizer's.
      start_id: What the decoder of an encoder-decoder starts from; -1: `eos_id`.

    Raises:
      ValueError: The tokenizer lacks one of them.
    """
    found = []
    needed = needed_tokens(config, seq_len)
    for token in needed:
        ids = [token_id(name) for name in (token, *_ALSO.get(token, ()))]
        known = [i for i in ids if i is not None]
        if not known:
            also = "".join(f" or {name!r}" for name in _ALSO.get(token, ()))
            count = f" ({len(needed)} of this kind)" if len(needed) > len(_INFILLING) else ""
            raise ValueError(
                f"objective.name: {config.name!r} needs the token {token!r}{also}{count}, which "
                "the tokenizer does not have; add it to data.special_tokens"
            )
        found.append(known[0])
    no_text = tuple(i for i in map(token_id, _NO_TEXT) if i is not None)
    ids = SpecialIds(eos_id, eos_id if start_id < 0 else start_id, no_text=no_text)
    if not found:
        return ids
    field = {"span_corruption": "sentinels", "fill_in_the_middle": "infilling"}.get(config.name)
    return dataclasses.replace(ids, **({field: tuple(found)} if field else {"mask": found[0]}))


def row_lengths(config: ObjectiveConfig, seq_len: int, family: str = "decoder") -> tuple[int, int]:
    """Lengths of `tokens` and `encoder_tokens` that rows of T tokens need after the transform.

    Args:
      config: The objective.
      seq_len: Tokens that a row takes from the corpus (T).
      family: The model's.
    """
    if config.name == "permutation_lm":
        return seq_len + num_predicted(seq_len, config.predict_share), 0
    if config.name == "span_corruption":
        source, target = spans.span_lengths(seq_len, config.mask_rate, config.mean_span)
        return (target, source) if family == "encoder_decoder" else (source + target - 1, 0)
    return seq_len, 0


def num_positions(config: ObjectiveConfig, seq_len: int, family: str = "decoder") -> int:
    """Positions that a model must tell apart for rows of T tokens: what model.seq_len must reach.

    The queries of a permuted row repeat positions; a span's sentinels take more of them.
    """
    if config.name == "span_corruption":
        return max(row_lengths(config, seq_len, family))
    return seq_len


def make_transform(
    config: ObjectiveConfig,
    ids: SpecialIds,
    vocab_size: int,
    seq_len: int,
    family: str = "decoder",
) -> Transform | None:
    """What happens to a row before it is a record, or None where nothing does.

    Args:
      config: The objective.
      ids: From `special_ids`.
      vocab_size: The tokenizer's.
      seq_len: Tokens of a row (T).
      family: The model's: a decoder reads a corrupted text as the prefix of its target.

    Raises:
      ValueError: Rows too short to hide a part of them.
    """
    if config.name in ("span_corruption", "permutation_lm") and seq_len < 2:
        raise ValueError(
            f"data.seq_len: {seq_len} leaves nothing to see for objective.name {config.name!r}; "
            "it must be at least 2"
        )
    mask = functools.partial(
        masked_lm,
        mask_rate=config.mask_rate,
        mask_share=config.mask_share,
        random_share=config.random_share,
        mask_id=ids.mask,
        ordinary_ids=np.setdiff1d(np.arange(vocab_size), ids.all),
        eos_id=ids.eos,
    )
    corrupt = functools.partial(
        spans.span_corruption,
        mask_rate=config.mask_rate,
        mean_span=config.mean_span,
        sentinels=np.array(ids.sentinels),
        eos_id=ids.eos,
        start_id=ids.start,
        one_stack=family != "encoder_decoder",
    )
    permute = functools.partial(
        permutation_lm,
        predict_share=config.predict_share,
        mask_id=ids.mask,
        special_ids=ids.all,
        eos_id=ids.eos,
    )
    infill = functools.partial(
        fill_in_the_middle,
        fim_rate=config.fim_rate,
        fim_spm_rate=config.fim_spm_rate,
        sentinels=ids.infilling,
        eos_id=ids.eos,
    )
    table = {
        # What predicts no next token has no use for a row's last one, the next row's first.
        "masked_lm": lambda row, rng: mask(row[:-1], rng),
        "span_corruption": lambda row, rng: corrupt(row[:-1], rng),
        "permutation_lm": lambda row, rng: permute(row[:-1], rng),
        "prefix_lm": functools.partial(prefix_lm, eos_id=ids.eos),
        "fill_in_the_middle": infill,
    }
    return table.get(config.name)
