"""Speculative decoding writes what the target alone writes: exactly, and in distribution."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt_jax import trees
from gpt_jax.decode.acceptance import accept, accept_probability, look_up, residual
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.decode.speculative import Stats, speculate
from gpt_jax.models.config import TransformerConfig
from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.ops import sampling

VOCAB, SEQ_LEN = 5, 32
# The last 3 rows of the embedding only pad it.
CONFIG = TransformerConfig(
    vocab_size=VOCAB + 3, seq_len=SEQ_LEN, num_layers=2, embed_dim=16, num_heads=2,
    attention="einsum",
)  # fmt: skip
# Another model altogether, whose context is shorter than the target's.
DRAFT = dataclasses.replace(CONFIG, num_layers=1, positions="learned", seq_len=20)
PROMPTS = [[3], [4, 1, 0, 1, 2, 2, 0, 3, 1, 4, 1], [0, 1, 0, 1, 0], [1, 2] * 13]


@functools.cache
def model_of(config, seed=0):
    """Parameters that make unequal logits."""
    boxed = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        one_dim = path.endswith(("bias", "scale"))
        std = 0.3 if one_dim else config.embed_dim**-0.5
        return rng.normal(1.0 if path.endswith("scale") else 0.0, std, leaf.shape)

    drawn = trees.map_named(draw, nn.unbox(boxed))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
    return SimpleNamespace(model=Transformer(config), params=params)


TARGET = model_of(CONFIG, 3)
DRAFTS = {"lookup": None, "other": model_of(DRAFT, 1), "itself": TARGET}


@functools.cache
def logits_after(ids):
    """The target's logits behind ids, f32[V + 3], without a cache."""
    padded_1T = np.zeros((1, SEQ_LEN), np.int32)
    padded_1T[0, : len(ids)] = ids
    return np.asarray(_whole(padded_1T)[0, len(ids) - 1])


@jax.jit
def _whole(tokens_BT):
    return TARGET.model.apply({"params": TARGET.params}, tokens_BT)


def greedy(prompt, limit, ends=(), min_tokens=0, bias=()):
    ids = tuple(prompt)
    while len(ids) < min(len(prompt) + limit, SEQ_LEN):
        row = logits_after(ids)[:VOCAB].copy()
        for token, value in bias:
            row[token] += value
        if len(ids) - len(prompt) < min_tokens:
            row[list(ends)] = -np.inf
        ids += (int(row.argmax()),)
        if ids[-1] in ends:
            break
    return list(ids[len(prompt) :])


def run(draft, prompts=PROMPTS, num_draft=3, eos_ids=(), **values):
    return speculate(
        TARGET, draft, prompts, SamplingParams(**values), num_draft, eos_ids=eos_ids,
        vocab_size=VOCAB,
    )  # fmt: skip


def ids_of(samples):
    return [[token.id for token in sample.tokens] for (sample,) in samples]


@pytest.mark.parametrize(
    ("name", "num_draft"), [("lookup", 3), ("other", 1), ("other", 3), ("itself", 3)]
)
def test_greedy_text_is_the_targets(name, num_draft):
    samples = run(DRAFTS[name], num_draft=num_draft, temperature=0.0, max_tokens=20)
    assert ids_of(samples) == [greedy(prompt, 20) for prompt in PROMPTS]
    assert len(samples[3][0].tokens) == SEQ_LEN - 26  # the context is full
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        text = [*prompt, *(token.id for token in sample.tokens)]
        for i, token in enumerate(sample.tokens):
            logprobs_V = jax.nn.log_softmax(logits_after(tuple(text[: len(prompt) + i])))
            np.testing.assert_allclose(token.logprob, logprobs_V[token.id], atol=2e-5)
        used = sample.stats
        assert used.tokens == len(sample.tokens)
        # Each pass adds a token beside the accepted ones; the last one may be cut off.
        assert used.tokens - used.passes <= used.accepted <= used.tokens - used.passes + 1
        assert used.accepted <= used.drafted <= used.passes * num_draft
        if name == "itself":
            assert used.acceptance_rate == 1.0
            assert used.passes == -(-len(sample.tokens) // (num_draft + 1))


def test_drafts_beyond_the_context_do_no_harm():
    """A table of learned positions ends with the context, where a pass still reads K drafts."""
    target, prompt = DRAFTS["other"], PROMPTS[1]
    ((sample,),) = speculate(
        target, TARGET, [prompt], SamplingParams(temperature=0.0, max_tokens=99), 3,
        vocab_size=VOCAB,
    )  # fmt: skip
    text = [*prompt, *(token.id for token in sample.tokens)]
    assert len(text) == DRAFT.seq_len
    logits_1TV = target.model.apply({"params": target.params}, np.array([text]))
    assert logits_1TV[0, :-1, :VOCAB].argmax(-1).tolist()[len(prompt) - 1 :] == text[len(prompt) :]


def test_drafts_are_good_for_something():
    total = {
        name: sum((s.stats for (s,) in run(d, temperature=0.0, max_tokens=20)), Stats(0, 0, 0, 0))
        for name, d in DRAFTS.items()
    }
    assert 0 < total["other"].acceptance_rate < 1
    assert 0.2 < total["lookup"].acceptance_rate < 1
    assert total["lookup"].passes < total["lookup"].tokens


@pytest.mark.parametrize("name", ["lookup", "itself"])
def test_what_ends_a_text(name):
    texts = [greedy(prompt, 20) for prompt in PROMPTS]
    late, end = max(
        (text.index(token), token)
        for text in texts
        for token in text
        if not all(token in other for other in texts)
    )
    assert late > 2
    rules = dict(temperature=0.0, max_tokens=20)
    samples = run(DRAFTS[name], eos_ids=[end], **rules)
    assert ids_of(samples) == [greedy(prompt, 20, [end]) for prompt in PROMPTS]
    assert {sample.finish_reason for (sample,) in samples} == {"stop", "length"}
    for (sample,) in samples:
        assert (sample.tokens[-1].id == end) == (sample.finish_reason == "stop")
    assert ids_of(run(DRAFTS[name], stop_ids=(end,), **rules)) == ids_of(samples)
    ignored = run(DRAFTS[name], eos_ids=[end], ignore_eos=True, **rules)
    assert ids_of(ignored) == [greedy(prompt, 20) for prompt in PROMPTS]
    later = run(DRAFTS[name], eos_ids=[end], min_tokens=8, **rules)
    assert ids_of(later) == [greedy(prompt, 20, [end], 8) for prompt in PROMPTS]
    bias = ((2, 0.7), (0, -1.5))
    biased = run(DRAFTS[name], logit_bias=bias, **rules)
    assert ids_of(biased) == [greedy(prompt, 20, bias=bias) for prompt in PROMPTS]
    assert ids_of(biased) != [greedy(prompt, 20) for prompt in PROMPTS]
    # Of the size that is compiled already.
    prompts = [*PROMPTS[:3], [1] * (SEQ_LEN - 1)]
    nothing = run(DRAFTS[name], prompts, temperature=0.0, max_tokens=0)
    assert ids_of(nothing) == [[]] * 4 and nothing[0][0].stats.passes == 0


def exact(prompt, num_tokens, rules):
    """The target's distribution of the next tokens under the rules, {ids: probability}."""
    lengths = range(num_tokens)
    contexts = [ids for n in lengths for ids in itertools.product(range(VOCAB), repeat=n)]
    padded_NT = np.zeros((len(contexts), SEQ_LEN), np.int32)
    for row, ids in zip(padded_NT, contexts, strict=True):
        row[: len(prompt) + len(ids)] = (*prompt, *ids)
    places = [len(prompt) + len(ids) - 1 for ids in contexts]
    logits_NV = _whole(padded_NT)[np.arange(len(contexts)), np.array(places), :VOCAB]
    p_NV = np.asarray(jax.jit(lambda x: jax.nn.softmax(sampling.restrict(x, rules)))(logits_NV))
    next_of = dict(zip(contexts, p_NV.astype(np.float64), strict=True))
    return {
        ids: np.prod([next_of[ids[:i]][ids[i]] for i in range(num_tokens)])
        for ids in itertools.product(range(VOCAB), repeat=num_tokens)
    }


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=3),
        dict(temperature=1.6, top_p=0.75),
        dict(temperature=1.2, min_p=0.35),
    ],
    ids=lambda values: "-".join(values),
)
@pytest.mark.parametrize("name", [pytest.param("lookup", marks=pytest.mark.slow), "other"])
def test_sampled_texts_have_the_targets_distribution(name, values):
    """Chi-square over 4,096 texts of 4 tokens; a wrong rule gives p under 1e-20."""
    prompt, n, length = [1, 0, 4, 1, 0], 4096, 4
    ((*samples,),) = run(DRAFTS[name], [prompt], n=n, max_tokens=length, seed=5, **values)
    rules = sampling.Rules(
        *(
            np.full(1, values.get(field, default), dtype)
            for field, default, dtype in (
                ("temperature", 1.0, np.float32), ("top_k", 0, np.int32),
                ("top_p", 1.0, np.float32), ("min_p", 0.0, np.float32),
            )
        )
    )  # fmt: skip
    expected = exact(prompt, length, rules)
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[tuple(token.id for token in sample.tokens)] += 1
    # What a rule excludes never comes; rare texts are counted together.
    assert all(counts[ids] == 0 for ids, p in expected.items() if p == 0)
    likely = [ids for ids, p in expected.items() if n * p >= 5]
    observed = [counts[ids] for ids in likely]
    wanted = [n * expected[ids] for ids in likely]
    if n - sum(wanted) > 1:
        observed, wanted = [*observed, n - sum(observed)], [*wanted, n - sum(wanted)]
    assert len(wanted) > 15
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3
    rate = sum((s.stats for s in samples), Stats(0, 0, 0, 0)).acceptance_rate
    assert 0.05 < rate < 0.95


def test_the_rule_gives_the_targets_distribution_exactly():
    """All drafts and all outcomes, over texts of 3 tokens and probabilities that depend on them."""
    rng, V, K = np.random.default_rng(0), 3, 2
    tables = {}
    for length in range(K + 1):
        for ids in itertools.product(range(V), repeat=length):
            p, q = rng.dirichlet(np.ones(V)), rng.dirichlet(np.full(V, 0.5))
            p[rng.integers(V)] *= rng.integers(2)  # tokens that the target never writes
            tables[ids] = p / p.sum(), q
    p_of, q_of = (lambda ids: tables[ids][0]), (lambda ids: tables[ids][1])

    found = dict.fromkeys(itertools.product(range(V), repeat=K + 1), 0.0)

    def complete(ids, probability):
        if len(ids) == K + 1:
            found[ids] += probability
            return
        for token in range(V):
            complete((*ids, token), probability * p_of(ids)[token])

    with jax.enable_x64(True):
        for drafted in itertools.product(range(V), repeat=K):
            before = [drafted[:i] for i in range(K)]
            p_1KV, q_1KV = (jnp.asarray([[of(ids) for ids in before]]) for of in (p_of, q_of))
            kept_K = np.asarray(accept_probability(p_1KV, q_1KV, jnp.asarray([drafted]))[0])
            instead_KV = np.asarray(residual(p_1KV[0], q_1KV[0]))
            chance = np.prod([q_of(ids)[token] for ids, token in zip(before, drafted, strict=True)])
            for i in range(K):
                for token in range(V):
                    rejected = chance * (1 - kept_K[i]) * instead_KV[i, token]
                    complete((*drafted[:i], token), rejected)
                chance *= kept_K[i]
            complete(drafted, chance)
    for ids, probability in found.items():
        wanted = np.prod([p_of(ids[:i])[ids[i]] for i in range(K + 1)])
        assert abs(probability - wanted) < 1e-12


def test_accept_draws_by_the_rule():
    """Where the first drafts are kept and which token follows, over 40,000 rows."""
    rng, V, K, B = np.random.default_rng(1), 4, 3, 40_000
    p_TV, q_KV = rng.dirichlet(np.ones(V), K + 1), rng.dirichlet(np.ones(V), K)
    drafted_K, num_drafted = np.array([2, 0, 3]), 2
    rows = (np.broadcast_to(x, (B, *x.shape)).astype(np.float32) for x in (p_TV, q_KV))
    tokens_BT, accepted_B = accept(
        *map(jnp.asarray, rows), jnp.asarray(np.broadcast_to(drafted_K, (B, K))),
        jnp.full(B, num_drafted), jax.random.split(jax.random.key(2), B),
    )  # fmt: skip
    tokens_BT, accepted_B = np.asarray(tokens_BT), np.asarray(accepted_B)
    observed, wanted, chance = [], [], 1.0
    for i in range(num_drafted + 1):
        kept = min(1, p_TV[i, drafted_K[i]] / q_KV[i, drafted_K[i]]) if i < num_drafted else 0
        left_V = np.maximum(p_TV[i] - q_KV[i] * (i < num_drafted), 0)
        for token in range(V):
            wanted.append(B * chance * (1 - kept) * left_V[token] / left_V.sum())
            observed.append(np.sum((accepted_B == i) & (tokens_BT[:, i] == token)))
        assert (tokens_BT[accepted_B > i, i] == drafted_K[i]).all()
        chance *= kept
    observed, wanted = np.array(observed), np.array(wanted)
    assert observed[wanted == 0].sum() == 0 and observed.sum() == B
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


@pytest.mark.parametrize("name", ["lookup", "other"])
def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(name):
    values = dict(max_tokens=12, seed=3, top_p=0.9)
    crowd = ids_of(run(DRAFTS[name], **values))
    assert ids_of(run(DRAFTS[name], PROMPTS[1:2], **values)) == crowd[1:2]
    (samples,) = run(DRAFTS[name], PROMPTS[1:2], n=4, **values)
    texts = [[token.id for token in sample.tokens] for sample in samples]
    assert texts[0] == crowd[1] and len(set(map(tuple, texts))) == 4
    assert ids_of(run(DRAFTS[name], **values | {"seed": 4})) != crowd


@pytest.mark.parametrize("num", [2, VOCAB + 1])
def test_top_logprobs_are_the_targets_most_likely(num):
    """Ids that only pad the embedding are not among them."""
    (sample,) = run(DRAFTS["other"], PROMPTS[1:2], max_tokens=6, top_logprobs=num)[0]
    text = list(PROMPTS[1])
    for token in sample.tokens:
        logprobs_V = np.asarray(jax.nn.log_softmax(logits_after(tuple(text))))
        best = np.argsort(-logprobs_V[:VOCAB])[:num]
        assert [token_id for token_id, _ in token.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in token.top], logprobs_V[best], atol=2e-5)
        text.append(token.id)


def slow_look_up(text, num_draft):
    for n in (3, 2, 1):
        places = [
            s for s in range(n, len(text)) if len(text) > n and text[s - n : s] == text[-n:]
        ]  # fmt: skip
        if places:
            best = max(places, key=lambda s: (min(len(text) - s, num_draft), s))
            return text[best : best + num_draft]
    return []


def test_look_up_finds_what_followed_before():
    rng = np.random.default_rng(0)
    texts = [[1], [2, 2], [1, 2, 3], [1, 2, 1, 2, 1], [7, 1, 2, 3, 9, 9, 1, 2, 3], [4] * 12]
    texts += [rng.integers(0, 4, rng.integers(1, 16)).tolist() for _ in range(60)]
    # What stands behind a text's end must not be found.
    text_BS = rng.integers(0, 4, (len(texts), 16))
    for row, text in zip(text_BS, texts, strict=True):
        row[: len(text)] = text
    drafted_BK, count_B = look_up(jnp.asarray(text_BS), jnp.asarray([len(t) for t in texts]), 3)
    for text, drafted, count in zip(texts, np.asarray(drafted_BK), count_B, strict=True):
        assert drafted[:count].tolist() == slow_look_up(text, 3)
    assert {int(count) for count in count_B} == {0, 1, 2, 3}


def with_tokenizer(model, fingerprint):
    tokenizer = SimpleNamespace(fingerprint=fingerprint, vocab_size=VOCAB)
    return SimpleNamespace(model=model.model, params=model.params, tokenizer=tokenizer)


SMALLER = model_of(dataclasses.replace(CONFIG, vocab_size=4))
ENCODER_DECODER = SimpleNamespace(
    model=Transformer(dataclasses.replace(CONFIG, family="encoder_decoder", start_id=0)), params={}
)


@pytest.mark.parametrize(
    ("target", "draft", "values", "message"),
    [
        (TARGET, SMALLER, {}, "draft: its vocabulary of 4 ids is not the target's of 8"),
        (with_tokenizer(TARGET, "a"), with_tokenizer(TARGET, "b"), {}, "draft: its tokenizer"),
        (ENCODER_DECODER, None, {}, "model.family: 'encoder_decoder'"),
        (TARGET, None, {"repetition_penalty": 1.5}, "repetition_penalty: 1.5"),
        (TARGET, None, {"presence_penalty": 0.5}, "presence_penalty: 0.5"),
        (TARGET, None, {"frequency_penalty": 0.5}, "frequency_penalty: 0.5"),
        (TARGET, None, {"no_repeat_ngram": 2}, "no_repeat_ngram: 2"),
        (TARGET, None, {"logit_bias": ((8, 1.0),)}, "logit_bias: 8"),
    ],
)
def test_what_is_refused(target, draft, values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        speculate(target, draft, [[1]], SamplingParams(**values))


def test_vocabularies_that_only_pad_differently_are_the_same():
    draft = with_tokenizer(model_of(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1), 3), "a")
    ((sample,),) = speculate(
        with_tokenizer(TARGET, "a"), draft, [[1, 2]],
        SamplingParams(temperature=0.0, max_tokens=8),
    )  # fmt: skip
    assert [token.id for token in sample.tokens] == greedy([1, 2], 8)
