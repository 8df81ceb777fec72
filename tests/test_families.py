"""Encoder, encoder-decoder and prefix LM: what sees what, caches, heads."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import trees
from gpt_jax.decode.engine import Engine
from gpt_jax.decode.generate import generate
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params, make_cache
from gpt_jax.ops import attention, products
from gpt_jax.runs import canonical
from gpt_jax.scaling import counts

SIZES = dict(vocab_size=40, seq_len=32, num_layers=2, embed_dim=16, num_heads=4)
ENCODER = TransformerConfig(
    **SIZES, family="encoder", head="tokens", num_classes=5, positions="learned",
    norm="layernorm", norm_order="post", embed_norm=True, num_token_types=2,
    activation="gelu_exact", bias=True, qk_norm=False,
)  # fmt: skip
T5 = TransformerConfig(
    **SIZES, family="encoder_decoder", positions="relative", relative_buckets=8,
    relative_max_distance=12, activation="geglu", scale_attention=False, qk_norm=False, start_id=0,
)  # fmt: skip
ORIGINAL = TransformerConfig(
    **SIZES, family="encoder_decoder", positions="sinusoidal", norm="layernorm",
    norm_order="post", activation="relu", bias=True, qk_norm=False, tied=True,
    scale_embedding=True, start_id=0,
)  # fmt: skip
PREFIX = TransformerConfig(**SIZES, read_prompts_whole=True)
# Every kind of layer: a window or none, two bases of the rotary positions or none.
WINDOWED = TransformerConfig(
    **SIZES | {"num_layers": 3}, window=3, global_layers=(1, 2), unrotated_layers=(2,),
    rope_theta=100.0, rope_local_theta=10.0, rope_scaling={"kind": "linear", "factor": 2.0},
    norm="rmsnorm_plus_one", norm_order="sandwich", attention_softcap=2.0, score_width=6,
    qkv_bias=True, activation="geglu", scale_embedding=True, tied=True, logit_softcap=4.0,
)  # fmt: skip
SCORED = TransformerConfig(
    **SIZES, head="sequence", num_classes=3, pool="last", bias=True, classifier_bias=False
)
CONFIGS = {
    "windowed": WINDOWED,
    "scored": SCORED,
    "encoder": ENCODER,
    "t5": T5,
    "original": ORIGINAL,
    "prefix": PREFIX,
}


def make(config, seed=0):
    """A model and parameters that are nowhere zero, so that every path counts."""
    model, rng = Transformer(config, "cpu"), np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))

    def draw(name, leaf):
        values = rng.standard_normal(leaf.shape)
        if leaf.ndim > 1 and name != "tokens":
            values *= leaf.shape[-2] ** -0.5
        return jnp.asarray(0.5 * values + name.endswith("scale"), jnp.float32)

    return model, trees.map_named(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions=None, segments=None, **inputs):
    return model.apply({"params": params}, tokens, positions, segments, **inputs)


def ids(*shape, seed=3):
    return jax.random.randint(jax.random.key(seed), shape, 1, 40)


def sees(config, **inputs):
    """bool[T, T]: does the output at i change with the token at j."""
    model, params = make(config)
    tokens = ids(1, 6)
    before = run(model, params, tokens, **inputs)
    changed = [run(model, params, tokens.at[0, j].add(1) % 40, **inputs) for j in range(6)]
    return np.stack([jnp.abs(after - before)[0].max(-1) > 1e-6 for after in changed], axis=1)


def test_an_encoder_sees_everything_and_a_decoder_what_came_before():
    assert sees(ENCODER).all()
    source = ids(1, 4, seed=9)
    np.testing.assert_array_equal(sees(T5, encoder_tokens=source), np.tri(6, dtype=bool))
    np.testing.assert_array_equal(sees(ORIGINAL, encoder_tokens=source), np.tri(6, dtype=bool))


def test_ranks_say_who_sees_whom():
    # One layer: through a second one a token would see what those it sees have seen.
    one = dataclasses.replace(PREFIX, num_layers=1)
    key = jnp.array([[0, 0, 0, 1, 2, 2**30]])
    query = jnp.array([[0, 0, 0, 1, 2, 1]])
    expected = np.array(
        [[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    )  # the last one is no key, but its own residual stream reaches its output
    np.testing.assert_array_equal(sees(one, key_ranks=key, query_ranks=query), expected == 1)


def test_a_window_hides_what_lies_before_it():
    one = dataclasses.replace(WINDOWED, num_layers=1, global_layers=(), unrotated_layers=())
    band = np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool)
    np.testing.assert_array_equal(sees(one), band)
    ranks = jnp.arange(6)[None]
    np.testing.assert_array_equal(sees(one, key_ranks=ranks, query_ranks=ranks), band)
    # Through a second layer that sees all, what the first one's tokens have seen is seen.
    two = dataclasses.replace(one, num_layers=2, global_layers=(1,))
    assert (sees(two) == np.tri(6, dtype=bool)).all()


def scanned(model, params):
    """The same model with its layers stacked."""
    model = model.clone(config=dataclasses.replace(model.config, scan=True))
    like = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    return model, trees.unflatten(canonical.stack(params), like)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_cache_longer_than_the_window_gives_the_full_forward_pass(scan):
    model, params = scanned(*make(WINDOWED)) if scan else make(WINDOWED)
    tokens = ids(2, 15)
    full, cache, outputs = (
        run(model, params, tokens),
        make_cache(model.config, 2, 20, "float32"),
        [],
    )
    for start, stop in [(0, 5), *((i, i + 1) for i in range(5, 10)), (10, 15)]:
        out, cache = run(model, params, tokens[:, start:stop], cache=cache)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), full, atol=2e-5)


@pytest.mark.slow
def test_layers_that_differ_may_be_scanned():
    model, params = make(WINDOWED)
    ours = run(*scanned(model, params), ids(2, 6))
    np.testing.assert_allclose(ours, run(model, params, ids(2, 6)), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_layers_that_differ_are_recomputed_as_they_were(remat):
    model, params = make(WINDOWED)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(model, params):
        return jax.grad(lambda p: jnp.square(run(model, p, ids(2, 9))).sum())(params)

    other, stacked = scanned(model, params)
    other = other.clone(config=dataclasses.replace(other.config, remat=remat))
    expected = canonical.stack(gradient(model, params))
    ours = gradient(other, stacked)
    for name, array in trees.flatten(ours).items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(array, expected[name], atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("implementation", ["blocked", "xla"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_windows_and_caps_are_the_same_in_all_implementations(implementation, softcap):
    rng = np.random.default_rng(0)
    shapes = (2, 150, 4, 8), (2, 150, 2, 8), (2, 150, 2, 8), (2, 150, 4, 8)
    q, k, v, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.arange(150) // 90 + 1)[None].repeat(2, 0)

    def pulled(name):
        how = dict(
            precision=products.precision("float32", "cpu"), segment_ids_BT=segments,
            window=jnp.int32(40), softcap=softcap, scale=0.7, implementation=name,
        )  # fmt: skip
        out, pull = jax.vjp(lambda *x: attention.attention(*x, **how), q, k, v)
        return out, *pull(g)

    for ours, expected in zip(
        jax.jit(pulled, static_argnums=0)(implementation),
        jax.jit(pulled, static_argnums=0)("einsum"),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_layers": (3,)}, r"^model.global_layers: \(3,\) is not .*below num_layers 3"),
        ({"window": 0}, "^model.global_layers: .* for models with a window"),
        ({"window": 0, "global_layers": ()}, "^model.rope_local_theta: 10.0 .* a window"),
        ({"read_prompts_whole": True}, "^model.window: 3 .*decoder"),
        ({"positions": "learned"}, "^model.rope_local_theta: 10.0 .*rotary"),
        ({"rope_scaling": {"kind": "ntk"}}, "^model.rope_scaling.kind: 'ntk' is not one of none"),
        ({"rope_scaling": {"kind": "yarn"}}, "^model.rope_scaling.original_length: 0 is not above"),
    ],
)
def test_layers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WINDOWED, **changes)


def test_a_window_saves_scores():
    whole = dataclasses.replace(WINDOWED, window=0, global_layers=(), rope_local_theta=0.0)
    saved = counts.flops_per_token(whole, 30) - counts.flops_per_token(WINDOWED, 30)
    # One layer of 4 heads of 4; of 30 keys (the rule's 15 on average) 3 * (2 - 0.1) remain.
    assert saved == pytest.approx(6 * 16 * (30 - 5.7))
    assert counts.flops_per_token(whole, 3) == counts.flops_per_token(WINDOWED, 3)


@pytest.mark.parametrize("name", ["windowed", "encoder", "t5", "original"])
def test_packed_equals_unpacked(name):
    model, params = make(CONFIGS[name])
    lengths, sources = (5, 3), (4, 6)
    parts = [ids(1, n, seed=n) for n in lengths]
    inputs = [{} for _ in parts]
    packed_inputs = {}
    if model.config.family == "encoder_decoder":
        inputs = [{"encoder_tokens": ids(1, n, seed=20 + n)} for n in sources]
        packed_inputs = {
            "encoder_tokens": jnp.concatenate([i["encoder_tokens"] for i in inputs], 1),
            "encoder_positions": jnp.concatenate([jnp.arange(n) for n in sources])[None],
            "encoder_segment_ids": jnp.repeat(jnp.array([1, 2]), jnp.array(sources))[None],
        }
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array(lengths))[None]
    packed = run(model, params, jnp.concatenate(parts, 1), positions, segments, **packed_inputs)
    alone = [run(model, params, p, **i) for p, i in zip(parts, inputs, strict=True)]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "original"])
def test_scan_equals_unrolled(name):
    model, params = make(CONFIGS[name])
    stacked_model, stacked = scanned(model, params)
    source = ids(2, 5, seed=9)
    ours = run(stacked_model, stacked, ids(2, 6), encoder_tokens=source)
    np.testing.assert_allclose(
        ours, run(model, params, ids(2, 6), encoder_tokens=source), atol=2e-5
    )


@pytest.mark.parametrize("name", ["t5", "original", "prefix"])
def test_decoding_with_caches_equals_the_full_forward_pass(name):
    model, params = make(CONFIGS[name])
    prompts = [ids(7, seed=5).tolist(), ids(3, seed=6).tolist()]
    sampling = SamplingParams(temperature=0.0, max_tokens=9)
    generated = generate(Engine(model, params), prompts, sampling, num_steps=4)
    for prompt, row in zip(prompts, generated, strict=True):
        chosen, logprobs, _ = zip(*row, strict=True)
        assert len(chosen) == 9
        if model.config.family == "encoder_decoder":
            tokens, inputs = [0, *chosen[:-1]], {"encoder_tokens": jnp.array([prompt])}
        else:
            tokens = [*prompt, *chosen[:-1]]
            ranks = np.maximum(np.arange(len(tokens)) - len(prompt) + 2, 0)[None]
            inputs = {"key_ranks": ranks, "query_ranks": ranks}
        logits = run(model, params, jnp.array([tokens]), **inputs)[0, -9:]
        full = np.asarray(jax.nn.log_softmax(logits))
        assert tuple(full.argmax(-1)) == chosen
        np.testing.assert_allclose(full[np.arange(9), list(chosen)], logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"head": "tokens", "num_classes": 5}, (2, 6, 5)),
        ({"head": "sequence", "num_classes": 3, "pool": "pooler"}, (2, 3)),
        ({"head": "sequence", "num_classes": 1, "pool": "mean"}, (2, 1)),
        ({"head": "span", "num_classes": 0}, (2, 6, 2)),
        ({"head": "mlm", "num_classes": 0}, (2, 6, 40)),
    ],
)
def test_heads_ignore_padding(changes, shape):
    model, params = make(dataclasses.replace(ENCODER, **changes))
    tokens, segments = ids(2, 6), jnp.array([[1] * 6, [1] * 4 + [0] * 2])
    outputs = run(model, params, tokens, None, segments)
    assert outputs.shape == shape and outputs.dtype == jnp.float32
    other = run(model, params, tokens.at[1, 4:].add(1), None, segments)
    rows = outputs[1] if outputs.ndim == 2 else outputs[1, :4]
    np.testing.assert_allclose(other[1] if outputs.ndim == 2 else other[1, :4], rows, atol=1e-6)


def test_the_last_token_is_that_before_the_padding():
    config = dataclasses.replace(PREFIX, head="sequence", num_classes=3, pool="last")
    model, params = make(config)
    tokens = ids(1, 4)
    padded = jnp.pad(tokens, ((0, 0), (0, 3)))
    segments = jnp.array([[1] * 4 + [0] * 3])
    np.testing.assert_allclose(
        run(model, params, padded, None, segments), run(model, params, tokens), atol=2e-6
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rank", [0, 2])
def test_counts_are_those_of_the_parameters(name, rank):
    config = dataclasses.replace(CONFIGS[name], lora_rank=rank, lora_targets=("attention/q$", "up"))
    shapes = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    assert counts.num_parameters(config) == trees.num_elements(nn.unbox(shapes))
