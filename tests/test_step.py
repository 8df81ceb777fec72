"""Properties of the training step, the optimizers and the meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import trees
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer
from gpt_jax.objectives.config import ObjectiveConfig
from gpt_jax.objectives.objectives import make_objective
from gpt_jax.ops.losses import cross_entropy, is_argmax
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.optim.durations import Clock, Duration
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.schedules import make_schedule
from gpt_jax.parallel import sharding
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.state import make_init, shardings
from gpt_jax.scaling import counts
from gpt_jax.train.step import train_step

CONFIG = TransformerConfig(
    vocab_size=64, seq_len=16, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2
)
CLOCK = Clock(tokens_per_step=128, tokens_per_epoch=10_000, total_steps=20)


def batches(number, batch_size=8, seed=0):
    """Batches with unequal masks, two documents a row."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        ids = rng.integers(0, 64, (batch_size, 17), dtype=np.int32)
        yield {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "loss_mask": (rng.random((batch_size, 16)) < rng.random((batch_size, 1))).astype("f4"),
            "positions": np.tile(np.r_[0:10, 0:6].astype(np.int32), (batch_size, 1)),
            "segment_ids": np.tile(np.r_[[1] * 10, [2] * 6].astype(np.int32), (batch_size, 1)),
        }


def set_up(config=CONFIG, optimizer="adamw", mesh=None, microbatches=1, **optimizer_values):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(config, "cpu")
    transform = make_optimizer(OptimizerConfig(name=optimizer, **optimizer_values), CLOCK)
    init = make_init(model, transform, 0)
    where = shardings(model, init, mesh)
    state = sharding.on_mesh(mesh, jax.jit(init, out_shardings=where))()
    step = functools.partial(
        train_step, model=model, objective=make_objective(ObjectiveConfig(z_loss=1e-3)),
        optimizer=transform, num_microbatches=microbatches, dropout=config.dropout > 0,
    )  # fmt: skip
    jitted = jax.jit(step, in_shardings=(where, None),
                     out_shardings=(where, None))  # fmt: skip
    return state, sharding.on_mesh(mesh, jitted)


def run(state, step, number=20, mesh=None, **kwargs):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    losses = []
    for batch in batches(number, **kwargs):
        rows = sharding.local_rows(8, mesh)
        state, metrics = step(state, sharding.global_batch(batch, rows, 8, mesh))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


def test_accumulation_changes_nothing():
    state, whole = set_up()
    _, parts = set_up(microbatches=4)
    one, metrics_one = whole(state, next(batches(1)))
    four, metrics_four = parts(state, next(batches(1)))
    for name in ("loss", "z_loss", "accuracy", "grad_norm", "num_targets"):
        np.testing.assert_allclose(metrics_four[name], metrics_one[name], rtol=1e-6, err_msg=name)
    # The gradients, which Adam's first moment holds; its first update would only show their signs.
    mu_one, mu_four = one.opt_state[1][0].mu, four.opt_state[1][0].mu
    for name, moment in trees.flatten(mu_one).items():
        scale = float(jnp.abs(moment).max())
        np.testing.assert_allclose(
            trees.flatten(mu_four)[name], moment, atol=1e-6 * scale + 1e-12, err_msg=name
        )


def test_microbatches_draw_different_dropout():
    # The same rows four times over: with one key for all, accumulating would change nothing.
    config = dataclasses.replace(CONFIG, dropout=0.5, init="gpt2")
    batch = {name: np.tile(array[:1], (8, 1)) for name, array in next(batches(1)).items()}
    drawn = []
    state, step = set_up(config, microbatches=2)
    for index in (0, 1):
        probe = {**batch, "loss_mask": batch["loss_mask"] * 0}
        # Microbatch m holds the rows m, m + 2, ...: only its rows count.
        probe["loss_mask"][index::2] = 1.0
        _, metrics = step(state, probe)
        drawn.append(float(metrics["loss"]))
    assert drawn[0] != drawn[1]


# The others are those of tests/test_equivalence.py too.
MESHES = [
    (2, 2, 2),
    *(pytest.param(m, marks=pytest.mark.slow) for m in [(8, 1, 1), (1, 8, 1), (1, 1, 4)]),
]


@pytest.fixture(scope="module")
def losses_on_one_device():
    return {
        (name, scan): run(*set_up(dataclasses.replace(CONFIG, scan=scan), name))[1]
        for name, scan in (("adamw", False), ("muon", True))
    }


@pytest.mark.parametrize(("optimizer", "scan"), [("adamw", False), ("muon", True)])
@pytest.mark.parametrize("shape", MESHES)
def test_meshes_agree(shape, optimizer, scan, losses_on_one_device):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    config = dataclasses.replace(CONFIG, scan=scan)
    state, step = set_up(config, optimizer, mesh=mesh, microbatches=1)
    if shape[1] * shape[2] > 1:  # parameters and slots do lie in parts
        kernel = trees.flatten(state.params)[
            "stack/layers/mlp/up/kernel" if scan else "stack/layers_0/mlp/up/kernel"
        ]
        assert kernel.addressable_shards[0].data.size < kernel.size
        split = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
        assert split and all(not x.sharding.is_fully_replicated for x in split)
    _, losses = run(state, step, mesh=mesh)
    np.testing.assert_allclose(losses, losses_on_one_device[optimizer, scan], rtol=1e-5)


def test_fsdp_splits_the_work_and_not_only_the_parameters():
    # Every device's share of the logits: its own row, whole vocabulary.
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    state, step = set_up(mesh=mesh)
    rows = sharding.local_rows(8, mesh)
    batch = sharding.global_batch(next(batches(1)), rows, 8, mesh)
    with jax.set_mesh(mesh):
        text = step.__wrapped__.lower(state, batch).compile().as_text()
    assert "f32[1,16,64]" in text or "f32[16,64]" in text
    assert "f32[8,16,64]" not in text and "f32[128,64]" not in text


def test_a_nonfinite_step_is_left_out_and_flagged():
    state, step = set_up()
    state, _ = step(state, next(batches(1)))
    poisoned = next(batches(1, seed=5))
    poisoned["loss_mask"][0, 0] = np.nan
    after, metrics = step(state, poisoned)
    assert int(after.flags["first_nonfinite"]) == 1 == int(metrics["first_nonfinite"])
    assert int(after.step) == 2
    for old, new in ((state.params, after.params), (state.opt_state, after.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, new, old)
    later, _ = step(after, next(batches(1)))
    assert int(later.flags["first_nonfinite"]) == 1


def test_cross_entropy_and_its_gradient_are_those_of_the_definition():
    logits = 4 * jax.random.normal(jax.random.key(0), (3, 5, 11))
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)
    weights = jax.random.uniform(jax.random.key(2), (3, 5))

    def ours(x):
        nll, z = cross_entropy(x, targets, 0.1)
        return ((nll + z) * weights).sum()

    def plain(x):
        z = 0.1 * jnp.square(jax.nn.logsumexp(x, axis=-1))
        nll = optax.softmax_cross_entropy_with_integer_labels(x, targets)
        return ((nll + z) * weights).sum()

    np.testing.assert_allclose(ours(logits), plain(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(plain)(logits), atol=1e-5)


def test_is_argmax_is_argmax():
    logits = jax.random.randint(jax.random.key(0), (50, 40, 5), 0, 3).astype(jnp.float32)
    logits = logits.at[0, :20, 2].set(jnp.nan)
    targets = jax.random.randint(jax.random.key(1), (50, 40), 0, 5)
    expected = jnp.argmax(logits, axis=-1) == targets
    # Where a NaN is the argmax, no target is a hit.
    expected &= ~jnp.isnan(logits).any(axis=-1)
    np.testing.assert_array_equal(is_argmax(logits, targets), expected)
    assert 0.1 < expected.mean() < 0.9


def ones(config):
    """Parameters of a model."""
    init = make_init(Transformer(config, "cpu"), make_optimizer(OptimizerConfig(), CLOCK), 0)
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(init).params)


def first_update(transform, grads, params):
    return jax.jit(lambda grads: transform.update(grads, transform.init(params), params)[0])(grads)


def test_decay_and_muon_go_by_path():
    # Gradients of zero: decay alone moves a parameter.
    transform = make_optimizer(OptimizerConfig(warmup=0), CLOCK)
    config = dataclasses.replace(CONFIG, norm="layernorm", bias=True)
    params = ones(config)
    updates = first_update(transform, jax.tree.map(jnp.zeros_like, params), params)
    for name, update in trees.flatten(updates).items():
        decayed = bool(jnp.abs(update).max() > 0)
        assert decayed == (not name.endswith(("scale", "bias"))), name


@pytest.mark.parametrize("scan", [False, True])
def test_muon_makes_orthogonal_updates_of_each_layers_matrices(scan):
    params = ones(dataclasses.replace(CONFIG, scan=scan))
    transform = make_optimizer(
        OptimizerConfig(
            name="muon", warmup=0, schedule="constant", muon_learning_rate=1.0, weight_decay=0.0,
            clip_norm=0.0,
        ),
        CLOCK,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
    updates = first_update(transform, grads, params)
    name = "stack/layers/attention/q/kernel" if scan else "stack/layers_1/attention/q/kernel"
    update = trees.flatten(updates)[name]
    matrix = (update[1] if scan else update).reshape(16, 16)
    singular = np.linalg.svd(matrix, compute_uv=False)
    # Five Newton-Schulz steps bring singular values near 1, not to it.
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_optimizer_bytes_are_those_of_the_state():
    for name in ("adamw", "muon"):
        transform = make_optimizer(OptimizerConfig(name=name), CLOCK)
        state = jax.eval_shape(make_init(Transformer(CONFIG, "cpu"), transform, 0))
        slots = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
        # Muon's state also holds its three coefficients.
        assert counts.optimizer_slots(name, CONFIG) == slots - (3 if name == "muon" else 0)


def test_schedules():
    def rates(name, **kwargs):
        values = {"peak": 1.0, "final": 0.1, "warmup": 4, "decay": 5, "total": 20, **kwargs}
        return np.array([make_schedule(name, **values)(step) for step in range(20)])

    for name in ("linear", "cosine", "wsd"):
        curve = rates(name)
        np.testing.assert_allclose(curve[:4], [0.25, 0.5, 0.75, 1.0], atol=0.03)
        assert curve[-1] == pytest.approx(0.1) and (np.diff(curve[4:]) <= 1e-6).all()
    assert (rates("wsd")[3:15] == 1).all() and rates("wsd")[15] < 1
    assert (rates("constant")[3:] == 1).all()
    assert rates("cosine", warmup=0)[9] == pytest.approx(0.55, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7), (7, 7), ("1 step", 1), ("1k steps", 1000), ("1.28k tokens", 10),
        ("1281 tokens", 11), ("2 epochs", 157), ("5%", 1), ("1e3 steps", 1000), ("0 steps", 0),
    ],
)  # fmt: skip
def test_durations(text, steps):
    assert Duration.parse("f", text).steps(CLOCK) == steps


@pytest.mark.parametrize("text", ["", "ten steps", "10", "5 weeks", "1.2.3 steps", -1, True])
def test_a_bad_duration_is_named(text):
    with pytest.raises(ValueError, match=r"^train\.duration: "):
        Duration.parse("train.duration", text)


@pytest.mark.parametrize(
    ("shape", "told"), [((3, 1, 1), "8 here"), ((-1, 3, 1), "8 here"), ((-1, -1, 1), "more than")]
)
def test_a_mesh_that_does_not_fit_is_refused(shape, told):
    with pytest.raises(ValueError, match=told):
        make_mesh(MeshConfig(*shape))


def test_hosts_shares_are_those_of_their_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    rows = sharding.local_rows(8, mesh)
    batch = next(batches(1))
    placed = sharding.global_batch({k: v[rows] for k, v in batch.items()}, rows, 8, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.addressable_shards[0].data.shape[0] == 2
