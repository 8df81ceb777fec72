"""Planted laws are found, refusals name what is missing, and intervals contain what they should."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from gpt_jax.models.config import TransformerConfig
from gpt_jax.scaling import (
    counts,
    finetuning,
    fits,
    huber,
    optima,
    plans,
    projection,
    rules,
    transfer,
)
from gpt_jax.scaling.bootstrap import bootstrap, interval
from gpt_jax.scaling.laws import (
    ComputeLaw,
    JointLaw,
    ParamDataLaw,
    RepeatedDataLaw,
    TransferLaw,
    UnifiedTransferLaw,
)
from gpt_jax.scaling.points import Points, budgets, points_of

CHINCHILLA = ParamDataLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
TINY = ParamDataLaw(E=1.1, A=30.0, B=40.0, alpha=0.35, beta=0.35)
MODEL = {"vocab_size": 257, "seq_len": 256, "num_layers": 2, "embed_dim": 32, "num_heads": 2}


def ladder(law, compute=(1e11, 3e11, 1e12, 3e12, 1e13), sizes=6, noise=0.0, seed=0):
    flops = np.repeat(compute, sizes)
    best, _ = law.optimum(flops)
    num_params = best * np.tile(np.geomspace(1 / 6, 6, sizes), len(compute))
    num_tokens = flops / 6 / num_params
    loss = law.predict(num_params, num_tokens)
    loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(flops)))
    names = tuple(f"run{i}" for i in range(len(flops)))
    return Points(names, num_params, num_tokens, flops, loss)


def constants(law):
    return np.array(dataclasses.astuple(law), float)


@pytest.mark.parametrize("method", fits.METHODS)
@pytest.mark.parametrize("law", [CHINCHILLA, TINY], ids=["chinchilla", "tiny"])
def test_planted_param_data_law(law, method):
    found = fits.fit_param_data(ladder(law, (1e18, 1e19, 1e20, 1e21)), method)
    np.testing.assert_allclose(constants(found), constants(law), rtol=1e-3)


def test_planted_law_without_an_irreducible_loss_has_none():
    law = ParamDataLaw(E=0.0, A=30.0, B=40.0, alpha=0.2, beta=0.3)
    found = fits.fit_param_data(ladder(law))
    np.testing.assert_allclose(constants(found), constants(law), rtol=1e-3, atol=1e-6)
    noisy = fits.fit_param_data(ladder(law, noise=0.05))
    assert min(noisy.E, noisy.A, noisy.B) >= 0


def test_planted_compute_law():
    law, flops = ComputeLaw(a=3e3, b=-0.2, c=1.3), np.geomspace(1e11, 1e13, 5)
    found = fits.fit_compute(flops, law.predict(flops))
    np.testing.assert_allclose(constants(found), constants(law), rtol=1e-3)


def test_optimum_is_the_least_loss_of_the_budget():
    flops = 1e20
    best, tokens = CHINCHILLA.optimum(flops, 6.5)
    assert best * tokens * 6.5 == pytest.approx(flops)
    sizes = np.geomspace(best / 3, best * 3, 4001)
    losses = CHINCHILLA.predict(sizes, flops / 6.5 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(best, rel=1e-3)
    assert CHINCHILLA.optimal_params(tokens) == pytest.approx(best)


def test_gradient_of_the_huber_objective():
    points = ladder(TINY, noise=0.01)
    size, tokens = np.log(points.num_params), np.log(points.num_tokens)
    design, loss = fits._design(size - size.mean(), tokens - tokens.mean()), np.log(points.loss)
    at = np.array([-0.3, -0.2, 0.1, 0.3, 0.4])
    _, gradient = huber.objective(at, design, loss)
    for i, step in enumerate(1e-6 * np.eye(5)):
        higher, lower = (huber.objective(at + s, design, loss)[0] for s in (step, -step))
        assert (higher - lower) / 2e-6 == pytest.approx(gradient[i], rel=1e-4, abs=1e-9)


def test_weightings_solved_together_are_those_solved_apart():
    points = ladder(TINY, noise=0.01)
    weights = np.random.default_rng(0).poisson(1.0, (3, len(points)))
    together = fits.fit_param_data_many(points, weights)
    for law, weight in zip(together, weights, strict=True):
        alone = fits.fit_param_data(points.take(np.repeat(np.arange(len(points)), weight)))
        np.testing.assert_allclose(constants(law), constants(alone), rtol=1e-5)


def test_isoflop_minima_and_the_exponent():
    points = ladder(CHINCHILLA, (1e18, 1e19, 1e20, 1e21), sizes=9)
    for method in optima.METHODS:
        minima = optima.isoflop_minima(points, method)
        assert [m.flops for m in minima] == pytest.approx([1e18, 1e19, 1e20, 1e21])
        size, tokens = optima.fit_minima(minima)
        assert size.p == pytest.approx(CHINCHILLA.params_exponent, abs=2e-3)
        assert size.p + tokens.p == pytest.approx(1, abs=1e-3)
    best, _ = CHINCHILLA.optimum(1e20)
    assert minima[2].num_params == pytest.approx(best, rel=0.03)


def test_a_minimum_at_the_edge_does_not_count():
    points = ladder(CHINCHILLA, (1e18, 1e19, 1e20))
    kept = (points.flops != 1e19) | (points.num_params < CHINCHILLA.optimum(1e19)[0])
    minima = optima.isoflop_minima(points.where(kept, "above the best"), "akima")
    assert [bool(m.reason) for m in minima] == [False, True, False]
    assert "largest" in minima[1].reason


def test_envelope_of_training_curves():
    sizes = np.geomspace(1e6, 1e10, 40)
    tokens = np.geomspace(1e7, 1e13, 200)
    curves = [optima.Curve("run", n, 6 * n * tokens, CHINCHILLA.predict(n, tokens)) for n in sizes]
    size, loss = optima.fit_envelope(curves)
    assert size.p == pytest.approx(CHINCHILLA.params_exponent, abs=0.01)
    assert loss.c == pytest.approx(CHINCHILLA.E, abs=0.01)
    with pytest.raises(ValueError, match="3 sizes with a curve, an envelope needs 4"):
        optima.fit_envelope(curves[:3])


def test_repeated_data_is_fresh_data_at_first_and_nothing_at_last():
    law = RepeatedDataLaw(CHINCHILLA, data_half=15.0, params_half=5.0)
    best = CHINCHILLA.optimal_params(1e9)
    assert law.predict(best, 1e9, 1e9) == pytest.approx(CHINCHILLA.predict(best, 1e9))
    _, barely = law.effective(best, 1.01e9, 1e9)
    assert barely == pytest.approx(1.01e9, rel=1e-5)
    size, data = law.effective(1e6 * best, 1e15, 1e9)
    assert data == pytest.approx(16e9)
    assert size == pytest.approx(6 * best)


def row(name, **more):
    kept = {"num_params": 10, "num_params_non_embedding": 8, "num_tokens": 100, "flops": 6e3}
    return {"name": name, "status": "finished", "loss": 2.0, "epochs": 0.5, **kept, **more}


def test_rows_that_are_no_points_are_named():
    points = points_of(
        [
            row("good"),
            row("twice", epochs=2.0),
            row("broke", status="unfinished"),
            row("blew_up", status="diverged", loss=None),
            row("odd", loss=float("nan")),
            row("bare", flops=None),
        ],
        params="num_params_non_embedding",
    )
    assert points.names == ("good", "twice")
    assert points.num_params.tolist() == [8, 8]
    assert points.unique_tokens.tolist() == [100, 50]
    assert points.excluded == (
        ("broke", "not finished (unfinished)"),
        ("blew_up", "diverged"),
        ("odd", "loss is nan"),
        ("bare", "flops is missing"),
    )
    with pytest.raises(ValueError, match="ledger: no finished run to fit \\(broke: not finished"):
        points_of([row("broke", status="unfinished")])
    with pytest.raises(ValueError, match="params: 'all' is not one of num_params,"):
        points_of([row("good")], params="all")


def test_too_few_runs_name_what_is_missing():
    points = ladder(TINY)
    two = points.where(points.num_params <= np.unique(points.num_params)[1], "large")
    with pytest.raises(
        ValueError, match=r"missing 4 more runs .2 of at least 6., 1 more sizes"
    ) as e:
        fits.fit_param_data(two)
    assert "excluded run" in str(e.value)
    with pytest.raises(ValueError, match=r"missing 1 more .2 of at least 3"):
        fits.fit_compute([1e11, 1e12], [2.0, 1.8])
    with pytest.raises(ValueError, match="method: 'lsq' is not one of vpnls, huber"):
        fits.fit_param_data(points, "lsq")


def test_budgets_gather_runs_of_nearly_equal_cost():
    groups = budgets(np.array([1.02e12, 3e11, 1e12, 3.1e11, 1.1e12]))
    assert [sorted(group.tolist()) for group in groups] == [[1, 3], [0, 2, 4]]


def test_bootstrap_is_repeatable_and_narrow_without_noise():
    exact = bootstrap(ladder(TINY), fits.fit_param_data, draws=20)
    low, high = interval(exact, lambda law: law.predict(1e6, 1e7))
    assert high - low < 1e-4
    noisy = ladder(TINY, noise=0.01)
    first, again = (bootstrap(noisy, fits.fit_param_data, draws=20, seed=3) for _ in range(2))
    assert first.laws == again.laws
    assert first.noise == pytest.approx(0.01, rel=0.4)
    low, high = interval(first, lambda law: law.predict([1e5, 1e6], 1e7))
    means = first.spread(lambda law: law.predict([1e5, 1e6], 1e7))
    assert np.all(low < means[0]) and np.all(means[1] < high)
    of_budgets = bootstrap(noisy, optima.fit_frontier, draws=20, within_budgets=True)
    assert of_budgets.freedom == 2  # five budgets, three constants


@pytest.mark.slow
def test_intervals_contain_new_runs_and_exponents():
    size, tokens = TINY.optimum(1e14)  # ten times the largest budget
    true = TINY.predict(size, tokens)
    runs = exponents = 0
    for seed in range(100):
        found = bootstrap(ladder(TINY, noise=0.005, seed=seed), fits.fit_param_data, 100, seed)
        low, high = interval(found, lambda law: law.predict(size, tokens))
        new_run = true * np.exp(0.005 * np.random.default_rng(1000 + seed).standard_normal())
        runs += low <= new_run <= high
        low, high = found.spread(lambda law: law.params_exponent)
        exponents += low <= TINY.params_exponent <= high
    assert 80 <= runs <= 97
    assert 80 <= exponents <= 97


# Transfer: Kaplan's L(N, D) from scratch, so that effective data is exact.
PLANTED = TransferLaw(k=2e3, alpha=0.2, beta=0.4)
UNIFIED = UnifiedTransferLaw(PLANTED, params_scale=1e3, data_scale=1e6, alpha_n=0.1, alpha_d=0.25)
SIZES = (2e4, 5e4, 1.2e5, 3e5)


def transfer_runs(amounts, of_finetuning, noise=0.0, seeds=1, seed=0):
    rng = np.random.default_rng(seed)
    cells = [(n, d) for n in SIZES for d in amounts for _ in range(seeds)]
    size, data = np.array(cells).T
    worth = data + PLANTED.predict(data, size) if of_finetuning else data
    ratio = UNIFIED.alpha_n / UNIFIED.alpha_d
    loss = ((UNIFIED.params_scale / size) ** ratio + UNIFIED.data_scale / worth) ** UNIFIED.alpha_d
    loss *= np.exp(noise * rng.standard_normal(len(loss)))
    names = tuple(f"run{i}" for i in range(len(loss)))
    return Points(names, size, data, 6 * size * data, loss)


def test_planted_transfer_law():
    scratch = transfer_runs(np.geomspace(1e3, 1e8, 400), False)
    tuned = transfer_runs(np.geomspace(1e3, 1e5, 5), True)
    found = transfer.effective_data(scratch, tuned)
    law = transfer.fit_transfer(found)
    np.testing.assert_allclose(constants(law), constants(PLANTED), rtol=0.02)
    entry = found[0]
    assert entry.fraction == pytest.approx(1 - 1 / entry.multiplier)
    assert entry.transferred == pytest.approx(PLANTED.predict(1e3, 2e4), rel=0.01)
    many = [e for e in transfer.effective_data(scratch, transfer_runs([1e6], True))]
    assert all("above 0.1" in e.reason for e in many)


def test_runs_without_effective_data_are_named():
    scratch = transfer_runs([1e4, 1e5, 1e6], False)
    best, worst = scratch.loss.min() * 0.9, scratch.loss.max() * 1.1
    names = ("good", "bad", "alone")
    size = np.array([2e4, 2e4, 7e4])
    tuned = Points(names, size, np.array([1e3, 2e3, 1e3]), size, np.array([best, worst, 1.0]))
    reasons = [e.reason for e in transfer.effective_data(scratch, tuned)]
    assert reasons == [
        "better than every run from scratch: D_E lies beyond them",
        "worse than the smallest run from scratch",
        "no run of this size from scratch",
    ]
    with pytest.raises(ValueError, match=r"missing 4 more usable cells .*; excluded N = 2e"):
        transfer.fit_transfer(transfer.effective_data(scratch, tuned))


def test_effective_tokens_of_a_curve_that_rises_in_between():
    tokens, loss = np.array([1e3, 1e4, 1e5, 1e6]), np.array([4.0, 3.0, 3.1, 2.0])
    assert transfer.effective_tokens(tokens, loss, 3.0) == pytest.approx(1e4)
    assert 1e4 < transfer.effective_tokens(tokens, loss, 2.5) < 1e6
    assert np.isnan(transfer.effective_tokens(tokens, loss, 1.9))


def test_planted_unified_and_joint_laws():
    scratch = transfer_runs(np.geomspace(1e3, 1e8, 6), False)
    tuned = transfer_runs(np.geomspace(1e3, 1e5, 4), True)
    low = dataclasses.replace(tuned, loss=UNIFIED.predict(tuned.num_tokens, tuned.num_params))
    found = finetuning.fit_unified(scratch, low)
    np.testing.assert_allclose(constants(found.transfer), constants(PLANTED), rtol=1e-3)
    assert found.alpha_d == pytest.approx(UNIFIED.alpha_d, rel=1e-3)
    law = JointLaw(A=30.0, alpha=0.2, beta=0.1, E=0.8)
    losses = law.predict(tuned.num_params, tuned.num_tokens)
    joint = finetuning.fit_joint(tuned.num_params, tuned.num_tokens, losses)
    np.testing.assert_allclose(constants(joint), constants(law), rtol=1e-3)

    def predict(rows, left_out):
        kept = finetuning.fit_joint(tuned.num_params[rows], tuned.num_tokens[rows], losses[rows])
        return kept.predict(tuned.num_params[left_out], tuned.num_tokens[left_out])

    errors = finetuning.leave_one_size_out(tuned.num_params, losses, predict)
    assert list(errors) == list(SIZES) and max(errors.values()) < 1e-3


@pytest.mark.slow
def test_transfer_intervals_contain_the_exponents():
    hits = np.zeros(2)
    for seed in range(40):
        scratch = transfer_runs(np.geomspace(1e3, 1e8, 11), False, 0.01, 2, seed)
        tuned = transfer_runs(np.geomspace(1e3, 1e5, 5), True, 0.01, 2, 1000 + seed)
        laws = transfer.bootstrap_transfer(scratch, tuned, draws=100, seed=seed)
        for i, name in enumerate(("alpha", "beta")):
            low, high = np.quantile([getattr(law, name) for law in laws], [0.05, 0.95])
            hits[i] += low <= getattr(PLANTED, name) <= high
    assert np.all(hits / 40 >= 0.75)


def test_counting_conventions():
    tied, untied = (TransformerConfig(**MODEL, tied=tied) for tied in (True, False))
    head = 257 * 32
    for config in (tied, untied):
        inner = counts.num_parameters(config, embeddings=False, head=False)
        assert counts.num_parameters(config, embeddings=False) == inner + head
        assert counts.num_parameters(config) == sum(counts.parameter_counts(config).values())
        alone = counts.flops_per_token(config, 256, head=False, attention=False)
        assert counts.flops_per_token(config, 256, attention=False) == alone + 6 * head
        norms = counts.parameter_counts(config)["norms"]
        assert alone == 6 * (inner - norms)
    assert counts.num_parameters(untied) == counts.num_parameters(tied) + head


def test_isoflop_plan():
    runs = plans.isoflop(MODEL, [1e11, 1e12], batch_size=8)
    assert [run["group"] for run in runs] == ["1e11"] * 6 + ["1e12"] * 6
    for run in runs:
        layers, width = run["model.num_layers"], run["model.embed_dim"]
        assert 16 <= width / layers <= 32
        own = {"num_layers": layers, "embed_dim": width, "num_heads": run["model.num_heads"]}
        config = TransformerConfig(**{**MODEL, **own})
        cost = counts.flops_per_token(config, 256) * 8 * 256 * run["train.duration"]
        assert cost == pytest.approx(float(run["group"]), rel=0.05)
    assert len({tuple(run.items()) for run in runs}) == 12
    with pytest.raises(ValueError, match="budgets: 1e\\+06 FLOPs"):
        plans.isoflop(MODEL, [1e6], batch_size=8)


def test_ladder_plan_keeps_tokens_a_parameter():
    for run in plans.ladder(MODEL, [1e4, 1e5], tokens_per_param=20, batch_size=1):
        own = {key.removeprefix("model."): run[key] for key in run if key.startswith("model.")}
        config = TransformerConfig(**{**MODEL, **own})
        size = counts.num_parameters(config, embeddings=False)
        assert run["train.duration"] * 256 / size == pytest.approx(20, rel=0.01)


def test_rules():
    porian = rules.suggest("porian", 108e6, 2e9, 1e18)
    assert (porian.learning_rate, porian.batch_tokens) == (0.0047, 160 * 2048)
    eighth = rules.suggest("porian", 108e6 / 8, 2e9, 1e18)
    assert eighth.learning_rate == pytest.approx(2 * 0.0047)
    assert rules.RULES["deepseek"].read == "not re-read"
    with pytest.raises(ValueError, match="rule: 'mine' is not one of porian"):
        rules.suggest("mine", 1e6, 1e7, 1e12)


def test_coefficients_are_those_of_nonnegative_least_squares():
    rng = np.random.default_rng(0)
    columns = np.abs(rng.normal(size=(4, 5, 3, 9))) + 0.1
    columns[:, :, 0] = 1
    columns[:, 1, 2] = columns[:, 1, 1]  # columns that coincide have no solution of their own
    columns[:, 2, 2] = 1  # and this one is the constant again
    columns[:, 3, 1] = 0
    weights = rng.integers(0, 3, size=(4, 9)).astype(float)
    y = rng.normal(size=9)
    found = projection._nonnegative(columns, y, weights)
    assert (found >= 0).all()
    for i, j in np.ndindex(4, 5):
        root = np.sqrt(weights[i])
        residual = np.linalg.norm(root * (y - found[i, j] @ columns[i, j]))
        _, least = scipy.optimize.nnls((columns[i, j] * root).T, y * root)
        assert residual == pytest.approx(least, rel=1e-6)
