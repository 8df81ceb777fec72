"""The prompt that asks a model for the text between a prefix and a suffix."""

from collections.abc import Sequence

from gpt_jax.data.infill_tokens import InfillTokens
from gpt_jax.data.tokenizers import Tokenizer

# In front of a text that is not the start of one. A tokenizer that marks the start with a space of
# its own marks this instead, and what follows is cut off from it.
_BEFORE = "\n"


def infill_prompt(
    tokenizer: Tokenizer,
    tokens: InfillTokens | None,
    prefix: str,
    suffix: str,
    *,
    before: Sequence[int] = (),
    order: str = "",
) -> list[int]:
    """Ids after which the model writes what stands between prefix and suffix.

    Its text ends at an id that ends any text, or at one of tokens.ends.

    Args:
      tokenizer: The model's.
      tokens: OpenModel.infill; None: it was not trained for this.
      prefix: The text before the gap; may be empty.
      suffix: The text behind it; may be empty.
      before: Ids that the model is used to before a text.
      order: One of tokens.orders; "": the first of them.

    Raises:
      ValueError: The model was not trained for it, or not in this order.
    """
    if tokens is None:
        raise ValueError("suffix: this model was not trained to fill in text before a suffix")
    order = order or tokens.orders[0]
    if order not in tokens.orders:
        raise ValueError(f"order: {order!r} is not among the model's, {', '.join(tokens.orders)}")
    first = tokenizer.encode(prefix) if prefix else []
    last = _continued(tokenizer, suffix) if suffix else []
    parts = {
        "psm": [tokens.prefix, *first, tokens.suffix, *last, tokens.middle],
        "spm": [tokens.prefix, tokens.suffix, *last, tokens.middle, *first],
    }
    return [*before, *parts[order]]


def _continued(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that is not the start of one."""
    alone = tokenizer.encode(text)
    if tokenizer.encode(_BEFORE + "a")[-1:] == tokenizer.encode("a"):  # it marks nothing
        return alone
    lead, behind = tokenizer.encode(_BEFORE), tokenizer.encode(_BEFORE + text)
    return behind[len(lead) :] if behind[: len(lead)] == lead else alone
