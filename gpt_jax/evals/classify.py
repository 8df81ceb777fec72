"""Classes of texts.

B batch, C classes; n texts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.data.examples import Record
from gpt_jax.evals.record_batches import record_batches
from gpt_jax.models.transformer import Transformer, forward
from gpt_jax.tasks.contract import Formatted
from gpt_jax.tasks.encode import encode_inputs
from gpt_jax.types import Array, Tree


def classify(
    opened: OpenModel,
    texts: Sequence[tuple[str, str]],
    *,
    top_k: int | None = None,
    function: str | None = None,
    batch_size: int = 32,
) -> list[list[dict[str, str | float]]]:
    """Names and scores of each text's classes, the best first.

    Args:
      opened, texts, batch_size: As class_scores'.
      top_k: How many of the classes; None: all.
      function: From logits to scores, a name of FUNCTIONS; None: "sigmoid" of a single class, else
        "softmax".

    Raises:
      ValueError: As class_scores, no such function, or top_k is below 1.
    """
    logits_nC = class_scores(opened, texts, batch_size)
    C = logits_nC.shape[1]
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k!r} is not at least 1")
    function = function or ("sigmoid" if C == 1 else "softmax")
    if function not in FUNCTIONS:
        raise ValueError(f"function_to_apply: {function!r} is not one of {', '.join(FUNCTIONS)}")
    labels = opened.labels or tuple(f"LABEL_{c}" for c in range(C))
    scores_nC = FUNCTIONS[function](logits_nC.astype(np.float64))
    best_nC = np.argsort(-scores_nC, axis=1, kind="stable")[:, :top_k]
    return [
        [{"label": labels[c], "score": float(scores_C[c])} for c in best_C]
        for scores_C, best_C in zip(scores_nC, best_nC, strict=True)
    ]


def as_pipeline(
    opened: OpenModel,
    texts: str | Mapping[str, str] | Sequence[str | Mapping[str, str]],
    *,
    top_k: int | None = 1,
    function: str | None = None,
) -> Any:
    """The same in the forms of Hugging Face's pipeline "text-classification".

    Args:
      opened: A model with the head "sequence".
      texts: A text, a dict of `text` and `text_pair`, or a list of them.
      top_k, function: As classify's.

    Returns:
      Of a list one dict of `label` and `score` each, of a text one in a list, of a dict one; with
      a top_k that is not 1, a list of them in its place.

    Raises:
      ValueError: As classify.
    """
    asked = [texts] if isinstance(texts, str | Mapping) else list(texts)
    pairs = [_pair(number, text) for number, text in enumerate(asked)]
    found = classify(opened, pairs, top_k=top_k, function=function)
    if isinstance(texts, str):
        return found[0]
    best = [each[0] for each in found] if top_k == 1 else found
    return best[0] if isinstance(texts, Mapping) else best


def _pair(number: int, asked: str | Mapping[str, str]) -> tuple[str, str]:
    if isinstance(asked, str):
        return asked, ""
    if not isinstance(asked, Mapping) or not isinstance(asked.get("text"), str):
        raise ValueError(f"texts[{number}]: {asked!r} is no text, and no dict with a `text`")
    return asked["text"], asked.get("text_pair") or ""


def class_scores(
    opened: OpenModel, texts: Sequence[tuple[str, str]], batch_size: int = 32
) -> np.ndarray:
    """What a classifier holds of texts: its logits.

    Args:
      opened: A model with the head "sequence".
      texts: Pairs of a text and the one that is read behind it, "" where there is none.
      batch_size: Texts at a time.

    Returns:
      f32[n, C].

    Raises:
      ValueError: No texts, one that is too long (its number is told), or another head.
    """
    config = opened.model.config
    if config.head != "sequence":
        raise ValueError(f"model.head: {config.head!r} gives no classes; that needs 'sequence'")
    if not texts:
        raise ValueError("texts: 0 are not at least 1")
    records = []
    for number, (text, pair) in enumerate(texts):
        # Told, and not cut: a label for half of a text would look like one for all of it.
        record = _record(opened, text, pair, config.seq_len + 1)
        size = len(record["tokens"])
        if size > config.seq_len:
            right = f"at most the model's context of {config.seq_len}"
            raise ValueError(f"texts[{number}]: {size} tokens or more are not {right}")
        records.append(record)
    scores_nC = np.zeros((len(records), config.num_classes), np.float32)
    batches = record_batches(records, batch_size, row_targets=True, most=config.seq_len)
    for numbers, batch in batches:
        logits_BC = jax.device_get(_logits(opened.params, batch, model=opened.model))
        scores_nC[numbers] = logits_BC[: len(numbers)]
    return scores_nC


def _record(opened: OpenModel, text: str, pair: str, room: int) -> Record:
    """What the model reads; a decoder of others what its own tokenizer makes."""
    config = opened.model.config
    if config.family == "encoder" or opened.trained_here:
        asked = Formatted(prompt=text, target="", text=text, pair=pair)
        return encode_inputs(asked, opened.tokenizer, config, room)
    ids = opened.tokenizer.encode(text) + opened.tokenizer.encode(pair)
    ids = [*opened.prefix_ids, *ids, *opened.suffix_ids][:room]
    target = {"targets": np.array(0, np.int32), "loss_mask": np.array(0, np.float32)}
    return {"tokens": np.array(ids, np.int32), **target}


@functools.partial(jax.jit, static_argnames="model")
def _logits(params: Tree, batch: dict, *, model: Transformer) -> Array:
    return forward(model, params, batch)


def _softmax(x_nC: np.ndarray) -> np.ndarray:
    e_nC = np.exp(x_nC - x_nC.max(-1, keepdims=True))
    return e_nC / e_nC.sum(-1, keepdims=True)


FUNCTIONS = {"softmax": _softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "none": lambda x: x}
