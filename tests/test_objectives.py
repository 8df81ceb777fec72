"""Losses equal their definitions, their sums add up, and wrong settings are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.objectives.config import READS, WITH_TEACHER, ObjectiveConfig
from gpt_jax.objectives.likelihood import likelihood, regression, span
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.objectives.teachers import count_pairs, distillation, dpo
from gpt_jax.ops.losses import label_smoothing

B, T, V = 4, 6, 9


def a_batch(seed=0, shape=(B, T), classes=V):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * 2
    batch = {
        "targets": rng.integers(0, classes, shape).astype(np.int32),
        "loss_mask": (rng.random(shape) < 0.7).astype(np.float32),
        "teacher_logits": rng.normal(size=logits.shape).astype(np.float32),
    }
    return logits, batch


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def at(x, targets):
    return np.take_along_axis(x, targets[..., None], -1)[..., 0]


def a_pair(seed=0):
    """Rows of two segments, 2 + 3 tokens and one of padding; the first of each is the prompt."""
    logits, batch = a_batch(seed)
    batch["segment_ids"] = np.tile([1, 1, 2, 2, 2, 0], (B, 1)).astype(np.int32)
    batch["loss_mask"] = np.tile([0, 1, 0, 1, 1, 0], (B, 1)).astype(np.float32)
    return logits, batch


@pytest.mark.parametrize("shape", [(B, T), (B,)])
def test_likelihood_with_smoothing_z_loss_and_weights(shape):
    logits, batch = a_batch(shape=shape)
    weights = tuple(np.linspace(0.0, 2.0, V).tolist())
    total, sums = likelihood(logits, batch, smoothing=0.1, z_loss=1e-2, class_weights=weights)
    log_p = log_softmax(logits)
    nll = -at(log_p, batch["targets"])
    z = 1e-2 * np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2
    smoothed = 0.9 * nll + 0.1 / V * (-log_p).sum(-1)  # PyTorch's formula
    mask, weight = batch["loss_mask"], np.array(weights)[batch["targets"]]
    np.testing.assert_allclose(total, ((smoothed + z) * weight * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], (nll * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"], (z * mask).sum(), rtol=1e-5)
    hits = (logits.argmax(-1) == batch["targets"]) * mask
    np.testing.assert_allclose(sums["accuracy"], hits.sum())
    with pytest.raises(ValueError, match=r"^objective.class_weights: 2 weights for 9 classes"):
        likelihood(logits, batch, class_weights=(1.0, 2.0))


def test_the_gradient_of_a_smoothed_loss():
    logits, batch = a_batch()

    def plain(x):
        log_p = jax.nn.log_softmax(x)
        one_hot = jax.nn.one_hot(batch["targets"], V)
        return (-(log_p * (0.7 * one_hot + 0.3 / V)).sum(-1) * batch["loss_mask"]).sum()

    got = jax.grad(lambda x: likelihood(x, batch, smoothing=0.3)[0])(logits)
    np.testing.assert_allclose(got, jax.grad(plain)(logits), atol=1e-6)


def test_smoothing_keeps_no_second_array_of_logits():
    logits, batch = a_batch(shape=(2, 32), classes=4096)

    def temporary_bytes(smoothing):
        def loss(x):
            return likelihood(x, batch, smoothing=smoothing)[0]

        return jax.jit(jax.grad(loss)).lower(logits).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(0.1) - temporary_bytes(0.0) < logits.nbytes / 8


def test_smoothing_of_certain_logits_stays_finite():
    logits = jnp.full((1, V), -1e4).at[0, 3].set(1e4)
    assert np.isfinite(label_smoothing(logits, jnp.array([3]), 0.1)).all()


def test_span():
    logits, batch = a_batch(shape=(B, 2), classes=T)
    outputs = logits.swapaxes(1, 2)  # [B, T, 2]
    batch["targets"] = batch["targets"] % 4
    batch["segment_ids"] = np.tile([1, 1, 1, 1, 0, 0], (B, 1))
    total, sums = span(outputs, batch)
    nll = -at(log_softmax(logits[..., :4]), batch["targets"])  # padding has no share
    np.testing.assert_allclose(total, (nll * batch["loss_mask"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], total)
    padding = {name: np.zeros_like(array) for name, array in batch.items()}
    value, grad = jax.value_and_grad(lambda x: span(x, padding)[0])(outputs)
    assert value == 0 and not np.asarray(grad).any()


def test_regression():
    outputs, targets = jnp.array([[1.0], [2.0], [5.0]]), np.array([0.0, 4.0, 0.0], np.float32)
    batch = {"targets": targets, "loss_mask": np.array([1, 1, 0], np.float32)}
    total, sums = regression(outputs, batch)
    assert (total, sums["loss"], sums["absolute_error"]) == (5.0, 5.0, 3.0)


@pytest.mark.parametrize("shape", [(B, T), (B,)])
def test_distillation(shape):
    logits, batch = a_batch(shape=shape)
    total, sums = distillation(logits, batch, temperature=2.0, teacher_weight=0.3)
    log_p, log_q = log_softmax(batch["teacher_logits"] / 2), log_softmax(logits / 2)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    nll, mask = -at(log_softmax(logits), batch["targets"]), batch["loss_mask"]
    np.testing.assert_allclose(sums["teacher_loss"], (4 * kl * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(total, ((0.7 * nll + 0.3 * 4 * kl) * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], (nll * mask).sum(), rtol=1e-5)
    # A teacher that is the student teaches nothing, and no gradient flows to it.
    alike = {**batch, "teacher_logits": jnp.asarray(logits)}
    assert abs(distillation(logits, alike)[1]["teacher_loss"]) < 1e-5
    grad = jax.grad(lambda x: distillation(logits, {**batch, "teacher_logits": x})[0])
    assert not np.asarray(grad(jnp.asarray(batch["teacher_logits"]))).any()


def test_a_class_that_the_teacher_rules_out():
    logits, batch = a_batch()
    batch["teacher_logits"][..., 2] = -np.inf
    value, grad = jax.value_and_grad(lambda x: distillation(x, batch)[0])(logits)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("loss", [distillation, dpo])
def test_a_teacher_of_another_vocabulary(loss):
    logits, batch = a_pair()
    batch["teacher_logits"] = batch["teacher_logits"][..., :-1]
    with pytest.raises(ValueError, match=r"^objective.teacher: .*\[4, 6, 8\].*\[4, 6, 9\]"):
        loss(logits, batch)


def test_dpo():
    logits, batch = a_pair()
    batch["loss_mask"][3] = 0  # a row of nothing is no pair
    batch["loss_mask"][2, :2] = 0  # nor is one without a chosen completion
    total, sums = dpo(logits, batch, beta=0.3)
    ours = at(log_softmax(logits), batch["targets"])
    theirs = at(log_softmax(batch["teacher_logits"]), batch["targets"])
    reward = 0.3 * (ours - theirs)
    chosen, rejected = reward[:2, 1], reward[:2, 3] + reward[:2, 4]
    margin = chosen - rejected
    np.testing.assert_allclose(total, np.log(1 + np.exp(-margin)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], total)
    np.testing.assert_allclose(sums["margin"], margin.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["chosen_reward"], chosen.sum(), atol=1e-6)
    np.testing.assert_allclose(sums["rejected_reward"], rejected.sum(), atol=1e-6)
    assert sums["accuracy"] == (margin > 0).sum() and count_pairs(batch) == 2
    # The reference model itself: no margin, a loss of ln 2, and the well-known gradient.
    alike = {**a_pair()[1], "teacher_logits": jnp.asarray(logits)}
    value, grad = jax.value_and_grad(lambda x: dpo(x, alike, beta=0.3)[0])(logits)
    np.testing.assert_allclose(value, B * np.log(2), rtol=1e-5)
    one_hot = np.eye(V)[batch["targets"]] - np.exp(log_softmax(logits))
    sign = np.array([0, 1, 0, -1, -1, 0])[:, None]
    np.testing.assert_allclose(grad, -0.5 * 0.3 * sign * one_hot, atol=1e-6)


def an_objective(name):
    """An objective with settings that are not the defaults, outputs and a batch for it."""
    settings = {"teacher": "run"} if name == "distillation" else {}
    if "z_loss" in READS[name]:
        settings |= {"z_loss": 1e-2, "label_smoothing": 0.1}
    if name == "labels":
        settings["class_weights"] = tuple(range(1, V + 1))
    logits, batch = a_pair() if name == "dpo" else a_batch()
    if name == "span":
        logits, batch = a_batch(shape=(B, 2), classes=T)
        logits = logits.swapaxes(1, 2)
        batch["segment_ids"] = np.ones((B, T), np.int32)
    if name == "regression":
        logits, batch = a_batch(shape=(B,), classes=1)
        batch["targets"] = batch["targets"].astype(np.float32)
    if name != "distillation" and name != "dpo":
        del batch["teacher_logits"]
    return make_objective(ObjectiveConfig(name, **settings)), logits, batch


@pytest.mark.parametrize("name", READS)
def test_sums_do_not_change_with_accumulation(name):
    objective, logits, batch = an_objective(name)
    assert objective.needs_teacher == (name in WITH_TEACHER)

    def everything(rows):
        part = {field: array[rows] for field, array in batch.items()}
        total, sums = objective.loss(logits[rows], part)
        return {**sums, "total": total, "count": objective.count(part)}

    whole, parts = everything(slice(None)), [everything(slice(0, 1)), everything(slice(1, None))]
    assert "loss" in whole and whole["count"] > 0
    for metric, value in whole.items():
        assert value.shape == ()
        np.testing.assert_allclose(parts[0][metric] + parts[1][metric], value, rtol=1e-5, atol=1e-6)


def test_held_out_data_need_no_teacher_to_judge_a_student():
    _, logits, batch = an_objective("causal_lm")
    config = ObjectiveConfig("distillation", teacher="run")
    objective = make_objective(config, training=False)
    assert not objective.needs_teacher
    assert objective.loss(logits, batch)[0] == likelihood(logits, batch)[0]
    assert make_objective(ObjectiveConfig("dpo"), training=False).needs_teacher


BAD = [
    ("name", "mlm", {}, "not one of causal_lm"),
    ("label_smoothing", 1.0, {}, r"1.0 is not in \[0, 1\)"),
    ("z_loss", float("nan"), {}, "nan is not a number of at least 0"),
    ("mask_rate", 1.5, {"name": "masked_lm"}, r"1.5 is not in \(0, 1\)"),
    ("mask_share", -0.1, {"name": "masked_lm"}, r"-0.1 is not in \[0, 1\]"),
    ("random_share", 0.3, {"name": "masked_lm"}, "more than 1 together"),
    ("mean_span", 0.5, {"name": "span_corruption"}, "0.5 is not a number of at least 1"),
    ("predict_share", 0.0, {"name": "permutation_lm"}, "0.0 is not in"),
    ("fim_rate", 2.0, {"name": "fill_in_the_middle"}, "2.0 is not in"),
    ("fim_spm_rate", 2.0, {"name": "fill_in_the_middle"}, "2.0 is not in"),
    ("class_weights", (1.0, -1.0), {"name": "labels"}, "not numbers of at least 0"),
    ("class_weights", (0.0,), {"name": "labels"}, "not all of them 0"),
    ("teacher", "", {"name": "distillation"}, "names no teacher"),
    ("temperature", 0.0, {"name": "distillation", "teacher": "r"}, "0.0 is not a number above 0"),
    ("teacher_weight", 1.1, {"name": "distillation", "teacher": "r"}, r"not in \[0, 1\]"),
    ("beta", 0.0, {"name": "dpo"}, "0.0 is not a number above 0"),
    ("mask_rate", 0.3, {}, "0.3 is not read by objective.name 'causal_lm'; leave it at 0.15"),
    ("label_smoothing", 0.1, {"name": "dpo"}, "not read by objective.name 'dpo'"),
]


@pytest.mark.parametrize("field, value, others, message", BAD)
def test_a_wrong_setting_is_named(field, value, others, message):
    with pytest.raises(ValueError, match=rf"^objective\.{field}: .*{message}"):
        ObjectiveConfig(**{**others, field: value})


def test_the_tables_of_objectives_are_whole():
    settings = {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"name"}
    assert set().union(*READS.values()) == settings
    assert set(WITH_TEACHER) <= set(READS)
