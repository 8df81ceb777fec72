"""The tokens by which a model is asked for the text between two others (arXiv:2207.14255).

Where a model was trained for it, a text with a gap reads in one of two orders:

    psm   PREFIX prefix SUFFIX suffix MIDDLE ...
    spm   PREFIX SUFFIX suffix MIDDLE prefix ...

and it goes on with what stood between.
"""

import dataclasses
from collections.abc import Callable

ORDERS = ("psm", "spm")


@dataclasses.dataclass(frozen=True)
class InfillTokens:
    """What a model calls the three parts.

    Attributes:
      prefix, suffix, middle: Ids before each part.
      orders: Those of ORDERS that it was trained with, the usual one first.
      ends: Ids that end the middle, beside those that end any text.
    """

    prefix: int
    suffix: int
    middle: int
    orders: tuple[str, ...] = ("psm",)
    ends: tuple[int, ...] = ()


# (prefix, suffix, middle), orders, what ends the middle. Tokenizers name the three by the family
# that introduced them: StarCoder and Granite; SantaCoder; CodeLlama; Qwen and CodeGemma; DeepSeek,
# whose second and third token stand for the hole and for the end of the prompt, in the same places.
_KNOWN = (
    (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ORDERS, ("<fim_pad>",)),
    (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), ORDERS, ("<fim-pad>",)),
    (("▁<PRE>", "▁<SUF>", "▁<MID>"), ORDERS, ("▁<EOT>",)),
    (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("psm",),
        ("<|fim_pad|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # With wide bars, which look like the others.
    (("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"), ("psm",), ()),
)


def known_infill_tokens(token_id: Callable[[str], int | None]) -> InfillTokens | None:
    """The tokens of a tokenizer whose names are well known; None where it has none of them.

    Args:
      token_id: The tokenizer's: a token's id, or None.
    """
    for names, orders, ends in _KNOWN:
        ids = [token_id(name) for name in names]
        if None not in ids:
            found = (token_id(name) for name in ends)
            return InfillTokens(*ids, orders, tuple(i for i in found if i is not None))
    return None


def trained_infill_tokens(
    sentinels: tuple[int, int, int], fim_rate: float, fim_spm_rate: float
) -> InfillTokens | None:
    """Those of a model trained here with data.infilling; None where it never saw a gap.

    Args:
      sentinels: Ids of prefix, suffix and middle.
      fim_rate: Share of the documents that were rearranged.
      fim_spm_rate: Of those, the share in the order SPM.
    """
    if not fim_rate:
        return None
    shares = {"psm": 1 - fim_spm_rate, "spm": fim_spm_rate}
    return InfillTokens(*sentinels, tuple(order for order in ORDERS if shares[order] > 0))
