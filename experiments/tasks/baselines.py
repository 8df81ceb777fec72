"""What plain methods score on the tasks, by the same splits and the same scores as the models.

  python experiments/tasks/baselines.py [TASK ...] [--split=test] [--limit=0]

Question: what does a model have to beat?  Methods without a network, each task within three
minutes on two cores.  Rows are added to baselines.json beside this file; those of the same task,
split and limit are replaced.  Needs scikit-learn, which the package seqeval brings, and the corpora
(`gpt-jax data fetch NAME`).
"""

import argparse
import itertools
import json
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from gpt_jax.parallel.startup import cache_dir
from gpt_jax.tasks import metrics
from gpt_jax.tasks.contract import Formatted, Task
from gpt_jax.tasks.table import find_task
from gpt_jax.tasks.tagging import entities

OUT = pathlib.Path(__file__).with_name("baselines.json")
# Of LogisticRegression; chosen by accuracy on the validation split.
_STRENGTHS = (3.0, 10.0, 30.0)
_TERMS = {"sublinear_tf": True, "min_df": 2, "max_features": 250_000}
_MAX_ENTITY = 10  # words
Examples = Sequence[Formatted]


def majority(task: Task, train: Examples, asked: Examples) -> list[int]:
    """The class that is most frequent in training."""
    (label, _), *_ = Counter(f.label for f in train).most_common()
    return [label] * len(asked)


def logistic(task: Task, train: Examples, asked: Examples) -> list[int]:
    """Logistic regression on TF-IDF of words and pairs; of Chinese, of 1 to 3 characters."""
    if task.name.endswith("_zh"):
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), **_TERMS)
    else:
        vectors = TfidfVectorizer(ngram_range=(1, 2), **_TERMS)
    x, y = vectors.fit_transform([f.text for f in train]), [f.label for f in train]
    held_out = task.formatted("validation", cache_dir())
    x_held, y_held = vectors.transform([f.text for f in held_out]), [f.label for f in held_out]
    models = [LogisticRegression(C=c, max_iter=300).fit(x, y) for c in _STRENGTHS]
    best = max(models, key=lambda model: model.score(x_held, y_held))
    return best.predict(vectors.transform([f.text for f in asked])).tolist()


def frequent_tag(task: Task, train: Examples, asked: Examples) -> list[list[int]]:
    """Each word's most frequent class in training; words not seen there are outside."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for f in train:
        for word, label in zip(f.words, f.word_labels, strict=True):
            counts[word][label] += 1
    best = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    return [[best.get(word, 0) for word in f.words] for f in asked]


def known_entities(task: Task, train: Examples, asked: Examples) -> list[list[int]]:
    """Entities of training, longest first; those that stand there as one more often than not."""
    kinds: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    for f in train:
        for kind, start, end in entities([task.labels[i] for i in f.word_labels]):
            if end - start <= _MAX_ENTITY:
                kinds[f.words[start:end]][kind] += 1
    seen: Counter = Counter()
    for f in train:
        seen.update(words for _, _, words in _known_parts(f.words, kinds))
    names = {
        words: count.most_common(1)[0]
        for words, count in kinds.items()
        if 2 * count.total() > seen[words]
    }
    predictions = []
    for f in asked:
        ids, end = [0] * len(f.words), 0
        for start, stop, words in _known_parts(f.words, names):
            if start >= end:  # the longest part of each start comes first
                kind, end = names[words][0], stop
                ids[start] = task.labels.index(f"B-{kind}")
                ids[start + 1 : stop] = [task.labels.index(f"I-{kind}")] * (stop - start - 1)
        predictions.append(ids)
    return predictions


def _known_parts(words: tuple[str, ...], known: dict):
    for start in range(len(words)):
        for stop in range(min(len(words), start + _MAX_ENTITY), start, -1):
            if words[start:stop] in known:
                yield start, stop, words[start:stop]


def copy_source(task: Task, train: Examples, asked: Examples) -> list[str]:
    """The source itself."""
    return [f.text for f in asked]


def nearest(task: Task, train: Examples, asked: Examples) -> list[str]:
    """The target of the training example whose question is most like this one, by TF-IDF."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    known = vectors.fit_transform([f.text or f.prompt for f in train])
    targets: list[str] = []
    for start in range(0, len(asked), 256):
        part = vectors.transform([f.text or f.prompt for f in asked[start : start + 256]])
        best = np.asarray((part @ known.T).argmax(axis=1)).ravel()
        targets += [train[i].target for i in best]
    return targets


def copy_line(task: Task, train: Examples, asked: Examples) -> list[str]:
    """The line before once more."""
    return ["\n" + _last_line(f.prompt) for f in asked]


def following_line(task: Task, train: Examples, asked: Examples) -> list[str]:
    """What most often follows the line before, in all lines of the training functions."""
    after: dict[str, Counter] = defaultdict(Counter)
    any_step: Counter = Counter()
    for f in find_task("body_from_docstring").formatted("train", cache_dir()):
        lines = [line for line in (f.prompt + f.target).split("\n") if line.strip()]
        for line, following in itertools.pairwise(lines):
            step = _indent(following) - _indent(line), following.strip()
            after[line.strip()][step] += 1
            any_step[step] += 1
    answers = []
    for f in asked:
        line = _last_line(f.prompt)
        ((deeper, text), _), *_ = after.get(line.strip(), any_step).most_common(1)
        answers.append("\n" + " " * max(0, _indent(line) + deeper) + text)
    return answers


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if line.strip()), "")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


METHODS: dict[str, tuple[Callable, ...]] = {
    "sentiment_en": (majority, logistic),
    "sentiment_zh": (majority, logistic),
    "topics_en": (majority, logistic),
    "ner_en": (frequent_tag, known_entities),
    "ner_zh": (frequent_tag, known_entities),
    "translate_en_de": (copy_source, nearest),
    "translate_en_zh": (copy_source, nearest),
    "complete_line": (copy_line, following_line, nearest),
    "body_from_docstring": (nearest,),
}


def run(name: str, split: str, limit: int) -> list[dict]:
    """A row for each method: its scores, and how long it took."""
    task = find_task(name)
    train = task.formatted("train", cache_dir())
    asked = task.formatted(split, cache_dir(), limit)
    rows = []
    for method in METHODS[name]:
        start = time.perf_counter()
        predictions = method(task, train, asked)
        seconds = round(time.perf_counter() - start, 1)

        def rescore(ids, predictions=predictions):
            return task.score([predictions[i] for i in ids], [asked[i] for i in ids])

        scores = task.score(predictions, asked)
        scores |= metrics.interval(scores, task.metric, task.is_share, rescore, len(asked))
        facts = {"task": name, "method": method.__name__, "split": split, "limit": limit}
        rows.append({**facts, "num_examples": len(asked), "seconds": seconds, **scores})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in scores.items() if isinstance(v, float))
        print(f"{name:<20} {method.__name__:<15} {seconds:>6.1f} s  {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(METHODS)}; none: all")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=0, help="examples, as `evaluate --limit`")
    arguments = parser.parse_args()
    for name in arguments.tasks or METHODS:
        new = run(name, arguments.split, arguments.limit)
        key = (name, arguments.split, arguments.limit)
        old = json.loads(OUT.read_text()) if OUT.exists() else []
        kept = [row for row in old if (row["task"], row["split"], row["limit"]) != key]
        OUT.write_text(json.dumps([*kept, *new], indent=1) + "\n")


if __name__ == "__main__":
    main()
