"""Our metrics against scikit-learn, definitions and hand counts."""

import itertools
import math

import numpy as np
import pytest

from gpt_jax.tasks import metrics


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_class_metrics_are_scikit_learns(num_classes, seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    true = rng.integers(num_classes, size=60)
    predicted = np.where(rng.random(60) < 0.5, true, rng.integers(num_classes, size=60))
    if seed == 2:  # a class that never occurs, one that is never predicted
        true[true == 0], predicted[predicted == num_classes - 1] = 1, 0
    counts = metrics.confusion(predicted, true, num_classes)
    assert np.array_equal(
        counts, sklearn.confusion_matrix(true, predicted, labels=range(num_classes))
    )
    expected = {
        "accuracy": sklearn.accuracy_score(true, predicted),
        "macro": sklearn.f1_score(true, predicted, average="macro", zero_division=0),
        "micro": sklearn.f1_score(
            true, predicted, labels=range(1, num_classes), average="micro", zero_division=0
        ),
        "matthews": sklearn.matthews_corrcoef(true, predicted),
    }
    ours = {
        "accuracy": metrics.accuracy(predicted, true),
        "macro": metrics.macro_f1(counts),
        "micro": metrics.micro_f1(counts, without=[0]),
        "matthews": metrics.matthews(counts),
    }
    assert ours == pytest.approx(expected, abs=1e-12)


def test_metrics_without_a_value():
    all_one = metrics.confusion(np.ones(5, int), np.ones(5, int), 2)
    assert metrics.matthews(all_one) == 0.0
    assert metrics.macro_f1(all_one) == 1.0
    assert metrics.micro_f1(all_one, without=[1]) == 0.0
    assert metrics.pearson(np.ones(4), np.arange(4)) == 0.0


def test_pearson_and_perplexity():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    assert metrics.pearson(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert metrics.perplexity(-4 * math.log(7), 4) == pytest.approx(7)
    assert metrics.perplexity(-1e6, 1) == math.inf


def test_entities_are_counted_as_conlleval_does():
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true = [list(rng.choice(tags, size)) for size in rng.integers(1, 12, 50)]
    guess = [[t if rng.random() < 0.7 else str(rng.choice(tags)) for t in row] for row in true]
    scores = metrics.entity_scores(guess, true)
    assert scores["entity_f1"] == pytest.approx(seqeval.f1_score(true, guess))
    assert scores["entity_precision"] == pytest.approx(seqeval.precision_score(true, guess))
    assert scores["entity_recall"] == pytest.approx(seqeval.recall_score(true, guess))
    assert metrics.entity_scores([["O"]], [["O"]])["entity_f1"] == 0.0


def test_bleu_and_chrf_come_with_signatures():
    references = [["the cat sat on the mat", "a cat sat on a mat"], ["it rains again today"]]
    scores = metrics.bleu_and_chrf(
        ["a cat sat on a mat", "it rains again today"], references, "13a"
    )
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert "tok:13a" in scores["bleu_signature"] and "nc:6" in scores["chrf_signature"]
    # One word of Chinese is several tokens only for the tokenizer that knows it.
    guess, answer = ["我们今天去北京看长城"], [["我们今天去北京看故宫"]]
    chinese = metrics.bleu_and_chrf(guess, answer, "zh")
    assert "tok:zh" in chinese["bleu_signature"]
    assert chinese["bleu"] > 50 > metrics.bleu_and_chrf(guess, answer, "13a")["bleu"]


def test_exact_match_takes_any_reference():
    assert metrics.exact_match(["a", "b", "c"], [["a"], ["x", "b"], ["y"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 5), (6, 0), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(n, c):
    samples = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        choices = list(itertools.combinations(samples, k))
        expected = np.mean([any(choice) for choice in choices])
        assert metrics.pass_at_k(n, c, k) == pytest.approx(expected)


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 0 of 20 is 0 to 0.1611.
    assert metrics.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0.0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert metrics.wilson_interval(1.0, 29)[1] == pytest.approx(1.0)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=4000)
    error = metrics.jackknife_error(lambda ids: values[ids].mean(), 4000, num_groups=200)
    assert error == pytest.approx(1 / math.sqrt(4000), rel=0.15)
    each = metrics.jackknife_error(lambda ids: values[ids].mean(), 50, num_groups=50)
    assert each == pytest.approx(values[:50].std(ddof=1) / math.sqrt(50))
    assert math.isnan(metrics.jackknife_error(lambda ids: 0.0, 1))


def test_interval_of_a_main_metric():
    shares = metrics.interval({"accuracy": 0.5}, "accuracy", True, None, 100)
    assert shares["accuracy_stderr"] == pytest.approx(0.05)
    assert shares["accuracy_low"] < 0.5 < shares["accuracy_high"]
    values = np.arange(100.0)
    other = metrics.interval(
        {"f1": values.mean()}, "f1", False, lambda ids: {"f1": values[ids].mean()}, 100
    )
    assert other["f1_high"] - values.mean() == pytest.approx(1.96 * other["f1_stderr"], rel=1e-3)
