"""muP and CompleteP: identity at the base, the rules of the tables, refusals, the two studies."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from gpt_jax import trees
from gpt_jax.convert.export_run import export_run
from gpt_jax.convert.open_model import open_model
from gpt_jax.convert.source import check_same
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.mup import fold_mup
from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.optim.config import OptimizerConfig
from gpt_jax.optim.durations import Clock
from gpt_jax.optim.optimizers import make_optimizer
from gpt_jax.optim.width_scaling import WidthScaling
from gpt_jax.runs.checkpoints import save_params
from gpt_jax.runs.config import run_config
from gpt_jax.train.setup import set_up

SMALL = TransformerConfig(vocab_size=32, seq_len=8, num_layers=2, embed_dim=32, num_heads=4)
AT_BASE = {"mup_base_width": 32, "mup_base_layers": 2, "mup_base_head_dim": 8}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8), dtype=np.int32)
CLOCK = Clock(1, 1, 10)


def drawn(config, key=0):
    init = jax.jit(lambda key: nn.unbox(init_params(Transformer(config), key)))
    return init(jax.random.key(key))


def noise(config, seed=0):
    """Parameters without zeros and ones, so that every one of them counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32) + 0.1),
        jax.eval_shape(lambda: drawn(config)),
    )


def outputs(config, params):
    return jax.jit(Transformer(config).apply)({"params": params}, TOKENS)


def updates(params, grads, scaling=WidthScaling(), **values):  # noqa: B008
    """The first update, by name."""
    values = {"warmup": 0, "schedule": "constant", "clip_norm": 0.0, "learning_rate": 0.1} | values
    optimizer = make_optimizer(OptimizerConfig(**values), CLOCK, scaling)
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])
    return trees.flatten(update(grads))


def assert_same_bits(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert np.asarray(array).tobytes() == np.asarray(expected[name]).tobytes(), name


def trained(config, optimizer, steps=3):
    """Parameters after some steps of next-token prediction."""
    model, clock = Transformer(config), CLOCK
    scaling = WidthScaling(config.width_multiplier, config.depth_multiplier)
    optimizer = make_optimizer(OptimizerConfig(name=optimizer, warmup=0), clock, scaling)

    def loss(params):
        logits = model.apply({"params": params}, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

    @jax.jit
    def step(params, slots):
        change, slots = optimizer.update(jax.grad(loss)(params), slots, params)
        return optax.apply_updates(params, change), slots

    params = drawn(config)
    slots = optimizer.init(params)
    for _ in range(steps):
        params, slots = step(params, slots)
    return params


@pytest.mark.parametrize(
    ("init", "optimizer", "tied"), [("gpt2", "adamw", True), ("fan_in", "muon", False)]
)
def test_the_base_is_the_standard_parametrisation_bit_for_bit(init, optimizer, tied):
    standard = dataclasses.replace(SMALL, init=init, tied=tied)
    at_base = dataclasses.replace(standard, **AT_BASE)
    assert_same_bits(trained(at_base, optimizer), trained(standard, optimizer))


def test_first_parameters():
    wide = dataclasses.replace(
        SMALL, embed_dim=128, num_heads=16, mlp_dim=512, num_layers=8, seq_len=64, init="gpt2",
        mup_base_width=32, mup_base_layers=2, positions="learned",
    )  # fmt: skip
    std = {name: float(leaf.std()) for name, leaf in trees.flatten(drawn(wide)).items()}
    hidden, residual = 0.02 / 4**0.5, 0.02 / 4**0.5 / (2 * 2) ** 0.5
    expected = {
        "stack/layers_3/attention/q/kernel": hidden, "stack/layers_3/mlp/up/kernel": hidden,
        "stack/layers_3/attention/out/kernel": residual, "stack/layers_3/mlp/down/kernel": residual,
        "tokens": 0.02, "positions": 0.01, "head": 0.02 / 2,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(std[name], value, rtol=0.05, err_msg=name)
    # "fan_in" has 1 / m_d in it already.
    by_fan_in = dataclasses.replace(wide, init="fan_in")
    assert_same_bits(drawn(by_fan_in), drawn(dataclasses.replace(by_fan_in, mup_base_width=0)))
    q = drawn(by_fan_in)["stack"]["layers_0"]["attention"]["q"]["kernel"]
    np.testing.assert_allclose(q.std(), 128**-0.5, rtol=0.05)


HEADS = {
    "tied": {"tied": True},
    "untied": {},
    "mlm": {"family": "encoder", "head": "mlm"},
    "sequence": {"family": "encoder", "head": "sequence", "num_classes": 3},
    "span": {"family": "encoder", "head": "span"},
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_divided_by_the_width(head):
    standard = dataclasses.replace(SMALL, **HEADS[head])
    # Logits have no bias but BERT's, which is added afterwards.
    params = trees.map_named(lambda name, leaf: leaf * (name != "mlm/bias"), noise(standard))
    half = outputs(dataclasses.replace(standard, mup_base_width=16), params)
    np.testing.assert_allclose(half, outputs(standard, params) / 2, rtol=1e-6)


def test_what_sublayers_add_is_divided_by_the_depth():
    deep = dataclasses.replace(SMALL, head="none", mup_base_layers=1)
    params = noise(deep)

    def halved(name, leaf):
        return leaf / 2 if "attention/out/" in name or "mlp/down/" in name else leaf

    shallow = dataclasses.replace(deep, mup_base_layers=0)
    expected = outputs(shallow, trees.map_named(halved, params))
    np.testing.assert_allclose(outputs(deep, params), expected, rtol=1e-5, atol=1e-6)


def test_scores_go_by_one_over_the_width_of_a_head():
    wide = dataclasses.replace(SMALL, head_dim=32, mup_base_width=16, mup_base_head_dim=8)
    assert wide.score_scale == 8**0.5 / 32
    assert dataclasses.replace(wide, head_dim=8).score_scale == 8**-0.5
    assert dataclasses.replace(wide, mup_base_head_dim=0).score_scale == 32**-0.5


def test_rates_decay_and_eps_of_adam():
    config = dataclasses.replace(
        SMALL, family="encoder", head="mlm", bias=True, lora_rank=2, lora_targets=("attention/q$",)
    )
    params = noise(config)
    grads = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    scaling = WidthScaling(4.0, 3.0)

    def ratio(grads, **values):
        scaled, plain = (updates(params, grads, s, **values) for s in (scaling, WidthScaling()))
        return {name: float((scaled[name] / plain[name]).mean()) for name in scaled}

    rate = ratio(grads, weight_decay=0.0)
    by_eps = ratio(grads, weight_decay=0.0, eps=1e6)
    decay = ratio(zeros, weight_decay=0.5)
    layer = "stack/layers_1/"
    table = {  # rate, and 1 over eps
        layer + "attention/q/kernel": (1 / 4, 12), layer + "attention/out/kernel": (1 / 4, 12),
        layer + "mlp/up/kernel": (1 / 4, 12), layer + "mlp/down/kernel": (1 / 4, 12),
        layer + "attention/q/lora_a": (1 / 4, 12), layer + "attention/q/lora_b": (1, 12),
        layer + "mlp/up/bias": (1, 12), layer + "mlp_norm/scale": (1, 12),
        "mlm/dense/kernel": (1 / 4, 4), "mlm/bias": (1, 4), "final_norm/scale": (1, 4),
        "tokens": (1, 4),
    }  # fmt: skip
    for name, (factor, per_eps) in table.items():
        assert rate[name] == pytest.approx(factor, rel=1e-4), name
        assert by_eps[name] == pytest.approx(factor * per_eps, rel=1e-4), name
        if name.endswith("kernel") or name == "tokens":
            assert decay[name] == pytest.approx(1, rel=1e-5), name


def test_muon_keeps_the_rate_of_its_matrices():
    params = noise(dataclasses.replace(SMALL, family="encoder", head="mlm"))
    grads = jax.tree.map(lambda leaf: leaf - 0.1, params)
    plain, scaled = (
        updates(params, grads, s, name="muon") for s in (WidthScaling(), WidthScaling(4.0, 2.0))
    )
    for name in ("stack/layers_0/attention/q/kernel", "stack/layers_1/mlp/down/kernel", "tokens"):
        np.testing.assert_allclose(scaled[name], plain[name], rtol=2e-3, atol=1e-5, err_msg=name)
    dense = "mlm/dense/kernel"  # Adam's
    np.testing.assert_allclose(scaled[dense], plain[dense] / 4, rtol=1e-4)


FOLDED = {
    **HEADS,
    "gemma": {"norm": "rmsnorm_plus_one", "activation": "geglu", "tied": True},
    "gpt2": {"norm": "layernorm", "bias": True, "qk_norm": False, "positions": "learned"},
    "scanned": {"scan": True},
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded_multipliers_leave_the_model_as_it_is(case):
    config = dataclasses.replace(
        SMALL, **FOLDED[case], mup_base_width=8, mup_base_layers=1, mup_base_head_dim=4
    )
    params = noise(config)
    folded, standard = fold_mup(config, params)
    assert (folded.width_multiplier, folded.depth_multiplier) == (1, 1)
    assert folded.score_width == 16
    np.testing.assert_allclose(
        outputs(folded, standard), outputs(config, params), rtol=2e-5, atol=2e-5
    )


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match=r"^model\.mup_base_width: 8 divides logits"):
        fold_mup(dataclasses.replace(SMALL, mup_base_width=8, norm_order="post"), {})
    with pytest.raises(ValueError, match=r"^model\.mup_base_head_dim: 7 does not divide"):
        fold_mup(dataclasses.replace(SMALL, mup_base_width=8, mup_base_head_dim=7), {})


def test_an_exported_run_is_the_same_model(tmp_path):
    model = {
        "vocab_size": 257, "seq_len": 16, "num_layers": 2, "embed_dim": 32, "num_heads": 4,
        "qk_norm": False, "activation": "swiglu", "mup_base_width": 8, "mup_base_layers": 1,
    }  # fmt: skip
    values = {"seed": 0, "data": {"tokenizer": "bytes", "seq_len": 16}, "model": model,
              "train": {"batch_size": 1, "duration": 1}}  # fmt: skip
    config = run_config(values)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    byte_tokenizer().save(run / "tokenizer.json")
    params = noise(config.model)
    save_params(run / "checkpoints", params, {"data": {}})
    export_run(str(run), tmp_path / "out")
    opened = open_model(str(tmp_path / "out"))
    assert opened.model.config.mup_base_width == 0
    np.testing.assert_allclose(
        outputs(opened.model.config, opened.params), outputs(config.model, params),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_parameters_of_another_parametrisation_are_refused():
    config = dataclasses.replace(SMALL, mup_base_width=8)
    with pytest.raises(ValueError, match=r"^model\.mup_base_width: 8 in the config, but old has 0"):
        check_same({"family": "decoder"}, config, "old")
    check_same(dataclasses.asdict(config), config, "same")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"mup_base_width": -1}, "mup_base_width: -1 is not at least 0"),
        ({"mup_base_width": 8, "positions": "relative"}, "mup_base_width: 8 .*'relative'"),
        ({"mup_base_width": 8, "scale_attention": False}, "mup_base_width: 8 .*scale_attention"),
        ({"mup_base_width": 8, "scale_embedding": True}, "mup_base_width: 8 .*scale_embedding"),
        ({"mup_base_width": 8, "scale_logits": True}, "mup_base_width: 8 .*scale_logits"),
        ({"mup_base_head_dim": 4}, "mup_base_head_dim: 4 .*mup_base_width 0"),
        (
            {"mup_base_width": 8, "mup_base_head_dim": 4, "score_width": 3},
            "mup_base_head_dim: 4 .*score_width",
        ),
        ({"mup_base_layers": 1, "family": "encoder_decoder"}, "mup_base_layers: 1 .*family"),
        ({"mup_base_layers": 1, "norm_order": "post"}, "mup_base_layers: 1 .*norm_order"),
    ],
)
def test_refused(values, told):
    with pytest.raises(ValueError, match=rf"^model\.{told}"):
        dataclasses.replace(SMALL, **values)


def config_of_run(corpus, **model):
    return run_config(
        {
            "seed": 0,
            "data": {"path": str(corpus), "tokenizer": "bytes", "seq_len": 16},
            "model": {"vocab_size": 257, "seq_len": 16, "num_layers": 2, "embed_dim": 16,
                      "num_heads": 1, **model},
            "optimizer": {"schedule": "constant", "warmup": 0, "weight_decay": 0.0},
            "train": {"batch_size": 2, "duration": 2, "tensorboard": False},
        }
    )  # fmt: skip


def test_a_run_gives_its_optimizer_the_multipliers(corpus, cache_dir, tmp_path):
    config = config_of_run(corpus, init="gpt2", mup_base_width=4, mup_base_layers=1)
    training = set_up(config, tmp_path / "run", cache_dir, jax.devices()[:1])
    before = jax.tree.map(np.asarray, training.state.params)
    batch = training.data.train.batch(0, 2, 0, None)
    state, _ = training.step(training.state, batch, training.fixed)
    training.lock.close()
    change = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), state.params, before)
    moved = trees.flatten(change)
    rate = config.optimizer.learning_rate  # the size of Adam's first update
    assert moved["tokens"] == pytest.approx(rate, rel=0.01)
    assert moved["stack/layers_0/mlp/up/kernel"] == pytest.approx(rate / 4, rel=0.01)


@pytest.fixture
def scripts(monkeypatch, cache_dir):
    """The folder is importable, as it is for its scripts, and its names are gone afterwards."""
    folder = ROOT / "experiments" / "mup"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("GPT_JAX_CACHE", str(cache_dir))
    yield
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def small(corpus, tmp_path, *words):
    return [f"--text={corpus}", "--batch_size=4", "--seq_len=32", "--seeds=1",
            f"--out={tmp_path / 'out.json'}", *words]  # fmt: skip


def test_sizes_of_activations_hold_under_mup_alone(scripts, corpus, tmp_path, capsys):
    import coordinate_check

    words = small(corpus, tmp_path, "--widths=16,64", "--steps=3", "--optimizers=adamw")
    result = coordinate_check.main([*words, "--layers=1"])
    standard, mup = (row["slopes"] for row in result["cases"])
    for name in ("logits", "mlp 0", "stream after 0"):
        assert abs(mup[name][-1]) < 0.2 < 0.4 < standard[name][-1], name
    assert "| adamw | mup | logits |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["largest_slope"] == result["largest_slope"]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_rates_are_traced_and_an_edge_is_an_error(scripts, corpus, tmp_path, capsys):
    import learning_rate_transfer as transfer

    words = small(corpus, tmp_path, "--widths=16,32", "--steps=4", "--eval_batches=1", "--layers=1")
    with pytest.raises(SystemExit) as ended:  # so few steps that more is better
        transfer.main([*words, "--rates=-16:-14"])
    assert ended.value.code == 2
    assert "error: --rates: the highest rate is the best of width 16" in capsys.readouterr().err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["losses"]["mup"]["16"] == found["losses"]["standard"]["16"]
    assert found["losses"]["mup"]["32"] != found["losses"]["standard"]["32"]
    losses = {"standard": {"16": [[3.0], [2.0], [2.5]]}, "mup": {"16": [[3.0], [2.0], [2.5]]}}
    summary = transfer.conclude({"rates": [0.1, 0.2, 0.4], "losses": losses})
    assert summary["mup"]["best_rate"] == {"16": 0.2}
    # The parabola through 3, 2, 2.5 is lowest a sixth behind the middle.
    assert summary["mup"]["log2_between"]["16"] == pytest.approx(np.log2(0.1) + 1 + 1 / 6)


def test_a_traced_rate_is_the_optimizers_own(scripts, corpus):
    import small_runs

    config = config_of_run(corpus, init="gpt2", mup_base_width=4)
    args = small_runs.arguments("", "x", steps=2).parse_args([f"--text={corpus}", "--seq_len=16"])
    batch = small_runs.prepare(args).train.batch(0, 2, 0, None)
    one = dataclasses.replace(config.optimizer, learning_rate=1.0)
    programs = small_runs.program(dataclasses.replace(config, optimizer=one))
    plain = small_runs.program(config)
    rate = config.optimizer.learning_rate
    traced, _ = programs.step(programs.start(1, rate), batch)
    own, _ = plain.step(plain.start(1, 1.0), batch)
    for name, leaf in trees.flatten(own.params).items():
        np.testing.assert_allclose(trees.flatten(traced.params)[name], leaf, atol=1e-8, rtol=1e-6)
