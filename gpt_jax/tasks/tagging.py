"""A class for each word: named entities.

Row:        {"words": ["Ann", "Lee", "flew", "to", "Rome"], "tags": ["B-PER", "I-PER", "O", "O",
            "B-LOC"]}
Formatted:  words, word_labels (1, 2, 0, 0, 5), prompt "Ann Lee flew to Rome =>",
            target " PER: Ann Lee; LOC: Rome"
Prediction: (1, 2, 0, 0, 0) of the head "tokens", or the text " PER: Ann Lee" of a language model
Score:      {"entity_f1": 0.667, "entity_precision": 1.0, "entity_recall": 0.5,
            "word_accuracy": 0.8}
"""

import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt_jax.tasks import metrics
from gpt_jax.tasks.contract import Formatted, Scores, Task, class_id
from gpt_jax.tasks.data_spec import DataSpec, distinct_values

_NOTHING = " none"
_KINDS = ("PER", "ORG", "LOC", "MISC")
_TFDS = DataSpec("conll2003:1.0.0", {"validation": "dev"}, {"words": "tokens", "tags": "ner"})


def format_row(row: dict, *, labels: tuple[str, ...], joiner: str) -> Formatted:
    """See the top of the file."""
    words, tags = row.get("words"), row.get("tags")
    for field, value in (("words", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{field}: {value!r} is no list of texts")
    if not words or len(words) != len(tags):
        raise ValueError(f"tags: {len(tags)} are not one for each of {len(words)} words")
    ids = tuple(class_id(labels, tag, f"tags: word {i}") for i, tag in enumerate(tags, 1))
    found = [f"{kind}: {joiner.join(words[a:b])}" for kind, a, b in entities(tags)]
    return Formatted(
        prompt=f"{joiner.join(words)} =>",
        target=f" {'; '.join(found)}" if found else _NOTHING,
        words=tuple(words),
        word_labels=ids,
        joiner=joiner,
    )


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first word, word behind the last) of BIO tags; an I- that continues nothing begins."""
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, here = tag.partition("-")
        if kind and (prefix != "I" or here != kind):
            yield kind, start, i
            kind = ""
        if prefix != "O" and not kind:
            start, kind = i, here


def read_answer(text: str, formatted: Formatted, labels: tuple[str, ...]) -> list[int]:
    """The class of each word by a language model's answer.

    Entities are looked for from left to right. One that the sentence does not hold has no place and
    is not counted, so that precision is kinder to a language model than to a head.
    """
    ids, cursor = [0] * len(formatted.words), 0
    for part in text.strip().split(";"):
        kind, _, name = part.strip().partition(": ")
        if f"B-{kind}" not in labels or not name:
            continue
        size, start = _find(formatted, name, cursor)
        if size:
            ids[start] = labels.index(f"B-{kind}")
            ids[start + 1 : start + size] = [labels.index(f"I-{kind}")] * (size - 1)
            cursor = start + size
    return ids


def _find(formatted: Formatted, name: str, cursor: int) -> tuple[int, int]:
    """(number of words, first word) of a name in the sentence; 0 words: it is not there."""
    parts = name.split(" ") if formatted.joiner else list(re.sub(r"\s", "", name))
    words = list(formatted.words)
    for start in [*range(cursor, len(words)), *range(cursor)]:
        if words[start : start + len(parts)] == parts:
            return len(parts), start
    return 0, 0


def score(predictions: Sequence, formatted: Sequence[Formatted], labels: tuple[str, ...]) -> Scores:
    """F1 of whole entities by seqeval (conlleval's rules), and the share of right words."""
    ids = [
        read_answer(p, f, labels) if isinstance(p, str) else list(p)
        for p, f in zip(predictions, formatted, strict=True)
    ]
    true = [[labels[i] for i in f.word_labels] for f in formatted]
    scores = metrics.entity_scores([[labels[i] for i in row] for row in ids], true)
    right = [i == k for row, f in zip(ids, formatted, strict=True)
             for i, k in zip(row, f.word_labels, strict=True)]  # fmt: skip
    return {**scores, "word_accuracy": float(np.mean(right))}


def _task(name: str, data: DataSpec, kinds: Sequence[str], joiner: str = " ") -> Task:
    labels = ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))
    ask = functools.partial(format_row, labels=labels, joiner=joiner)
    judge = functools.partial(score, labels=labels)
    heads = ("tokens", "lm")
    return Task(name, data, ask, judge, "entity_f1", heads=heads, labels=labels, max_tokens=96)


def from_file(name: str, path: str) -> Task:
    """A task of one's own rows; the kinds of entities are those in their tags."""
    tags = distinct_values(path, "tags")
    return _task(name, DataSpec(path), sorted({tag[2:] for tag in tags if tag[1:2] == "-"}))


TASKS = (
    _task("ner_en", DataSpec("conll2003"), _KINDS),
    _task("ner_zh", DataSpec("peoples_daily_ner"), _KINDS[:3], joiner=""),
    _task("ner_en_tfds", _TFDS, _KINDS),
)
