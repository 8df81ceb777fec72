"""Metrics: our own numpy for what is a formula, the field's libraries for what is a convention.

C classes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_Z = 1.959964  # of a normal distribution, 95 % lie within this many standard deviations


def mean(values: Iterable) -> float:
    """The mean of numbers or truth values."""
    return float(np.mean([float(value) for value in values]))


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """The share of places where both are the same."""
    return float(np.mean(np.asarray(predicted) == np.asarray(true)))


def confusion(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """int[C, C]: how often the true class (row) was called something (column)."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    return counts


def macro_f1(counts: np.ndarray) -> float:
    """The mean F1 of the classes that occur, in truth or prediction; from a confusion."""
    right, both = np.diag(counts), counts.sum(0) + counts.sum(1)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))


def micro_f1(counts: np.ndarray, without: Sequence[int] = ()) -> float:
    """F1 of all classes together, but for those of `without`; from a confusion."""
    kept = np.setdiff1d(np.arange(len(counts)), without)
    both = counts.sum(0)[kept].sum() + counts.sum(1)[kept].sum()
    return float(2 * np.diag(counts)[kept].sum() / both) if both else 0.0


def matthews(counts: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where it has no value."""
    counts = counts.astype(float)
    total, true, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = np.trace(counts) * total - true @ predicted
    spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / math.sqrt(spread)) if spread else 0.0


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """The correlation of two series; 0 where one of them is constant."""
    x, y = np.asarray(predicted, float), np.asarray(true, float)
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread else 0.0


def perplexity(logprob: float, num_tokens: int) -> float:
    """exp of the nats a token."""
    nats = -logprob / num_tokens
    return math.exp(nats) if nats < 700 else math.inf


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions that are one of their references."""
    return mean(p in r for p, r in zip(predictions, references, strict=True))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias (arXiv:2107.03374).

    1 - C(n - c, k) / C(n, k), as a product that does not overflow.
    """
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples
    if num_samples - num_right < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(num_samples - num_right + 1, num_samples + 1)))


def entity_scores(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
) -> dict[str, float]:
    """F1, precision and recall of whole entities from tags by sentence, as conlleval counts."""
    from seqeval.metrics.sequence_labeling import get_entities

    right = num_predicted = num_true = 0
    for tags, answer in zip(predicted, true, strict=True):
        assert len(tags) == len(answer)
        found, wanted = set(get_entities(tags)), set(get_entities(answer))
        right += len(found & wanted)
        num_predicted, num_true = num_predicted + len(found), num_true + len(wanted)
    return {
        "entity_f1": 2 * right / max(1, num_predicted + num_true),
        "entity_precision": right / max(1, num_predicted),
        "entity_recall": right / max(1, num_true),
    }


def bleu_and_chrf(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str
) -> dict[str, float | str]:
    """Corpus BLEU and chrF by sacreBLEU, each with the signature that makes it comparable.

    Args:
      predictions: A text each.
      references: For each prediction the texts that are right, of any number.
      tokenize: sacreBLEU's name of a tokenizer: "13a", "zh", ...
    """
    from sacrebleu.metrics import BLEU, CHRF

    streams = list(itertools.zip_longest(*references))
    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(list(predictions), streams).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def wilson_interval(share: float, num_examples: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent examples (Wilson 1927)."""
    n, z2 = num_examples, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def jackknife_error(
    statistic: Callable[[np.ndarray], float], num_examples: int, num_groups: int = 20
) -> float:
    """The standard error of any score of a set, from leaving out a group at a time.

    Args:
      statistic: From the numbers of the examples to score to the score.
      num_examples: How many there are.
      num_groups: How often the rest is scored; the groups are drawn with a fixed seed.
    """
    groups = min(num_groups, num_examples)
    if groups < 2:
        return math.nan
    order = np.random.default_rng(0).permutation(num_examples)
    values = [
        statistic(np.setdiff1d(order, left_out)) for left_out in np.array_split(order, groups)
    ]
    return math.sqrt((groups - 1) * float(np.var(values)))


def interval(
    scores: dict, metric: str, is_share: bool, rescore: Callable, num_examples: int
) -> dict[str, float]:
    """Standard error and 95 % interval of a main metric, under its name with a suffix.

    Args:
      scores: What `metric` is in.
      metric: Its name.
      is_share: It is a share of the examples; then the interval is Wilson's.
      rescore: From numbers of examples to their scores.
      num_examples: How many there are.
    """
    value = float(scores[metric])
    if is_share:
        error = math.sqrt(value * (1 - value) / num_examples)
        low, high = wilson_interval(value, num_examples)
    else:
        error = jackknife_error(lambda ids: float(rescore(ids)[metric]), num_examples)
        low, high = value - _Z * error, value + _Z * error
    return {f"{metric}_stderr": error, f"{metric}_low": low, f"{metric}_high": high}
