"""The engine: who comes and goes, and that nobody's text depends on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_fixtures import CONFIG as UNROLLED
from decode_fixtures import SEQ_LEN, VOCAB_SIZE, forward, params_for

from gpt_jax.decode import prefixes, slots
from gpt_jax.decode.engine import Engine, QueueFull
from gpt_jax.decode.generate import generate
from gpt_jax.decode.request import Request
from gpt_jax.decode.sampling_params import SamplingParams
from gpt_jax.models.transformer import Transformer, init_params
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.parallel.sharding import param_shardings

# Scanned layers compile faster.
CONFIG = dataclasses.replace(UNROLLED, scan=True)
LONG = tuple((7 * i) % VOCAB_SIZE for i in range(21))
SHORT = (5, 1, 4, 1, 5, 9, 2, 6, 5)


def make(*, max_slots=4, **how):
    """With few sizes of batches: each is compiled."""
    how["max_slots"] = max_slots
    return Engine(Transformer(CONFIG), params_for(CONFIG), vocab_size=VOCAB_SIZE, **how)


def drain(engine, num_steps=None):
    """{(job's id, sample): (ids, finish reason)} of all that is left to do."""
    found = {}
    while not engine.idle:
        for job, output in engine.step(num_steps):
            ids, reason = found.get((job.id, output.sample), ([], None))
            assert reason is None, "nothing comes behind the end"
            found[job.id, output.sample] = (
                ids + [t.id for t in output.tokens],
                output.finish_reason,
            )
    return found


def request(prompt=SHORT, constraint=None, prompt_logprobs=False, **values):
    params = SamplingParams(**{"max_tokens": 10, "temperature": 0.0, **values})
    return Request(tuple(prompt), params, constraint, prompt_logprobs)


def one(engine, prompt=SHORT, **values):
    """Ids of one text."""
    (row,) = generate(engine, [prompt], request(**values).params)
    return [token.id for token in row]


@pytest.fixture(scope="module")
def engine():
    return make()


def plain(prompt, max_tokens=10, *, bias=(), repetition=1.0, presence=0.0, frequency=0.0, ngram=0,
          end_id=None, min_tokens=0):  # fmt: skip
    """Greedy by whole forward passes and numpy."""
    ids, new = list(prompt), []
    while len(new) < max_tokens and (not new or new[-1] != end_id):
        logits = forward(CONFIG)(ids)[-1, :VOCAB_SIZE].astype(np.float64)
        for token_id, value in bias:
            logits[token_id] += value
        for token_id in set(ids):
            logits[token_id] *= repetition if logits[token_id] < 0 else 1 / repetition
        for token_id in set(new):
            logits[token_id] -= presence + frequency * new.count(token_id)
        for start in range(len(ids) - ngram + 1 if ngram else 0):
            if ids[start : start + ngram - 1] == ids[len(ids) - ngram + 1 :]:
                logits[ids[start + ngram - 1]] = -np.inf
        if end_id is not None and len(new) < min_tokens:
            logits[end_id] = -np.inf
        new.append(int(logits.argmax()))
        ids.append(new[-1])
    return new


RULES = {
    "bias": (dict(logit_bias=((3, 4.0), (9, -100.0))), dict(bias=((3, 4.0), (9, -100.0)))),
    "repetition": (dict(repetition_penalty=1.7), dict(repetition=1.7)),
    "counts": (
        dict(presence_penalty=0.7, frequency_penalty=1.1), dict(presence=0.7, frequency=1.1)
    ),
    "ngrams": (dict(no_repeat_ngram=2), dict(ngram=2)),
}  # fmt: skip
# How it goes on depends on each rule, and on the rules' counting it too.
REPETITIVE = (28, 9, 3, 7, 8, 7, 7)


def test_each_rule_does_what_numpy_does_and_leaves_its_neighbours_alone(engine):
    free = plain(REPETITIVE)
    assert all(plain(REPETITIVE, **theirs) != free for _, theirs in RULES.values())
    ours, theirs = ({k: v for rule in RULES.values() for k, v in rule[i].items()} for i in (0, 1))
    # While this one runs, the others come and go in the places that are left.
    whole = engine.submit(request(REPETITIVE, max_tokens=25, **ours))
    jobs = []
    for prompt, size in ((REPETITIVE, 6), ((7, 28, 9, 11, 11, 11, 28), 4)):
        for rule_ours, rule_theirs in [*RULES.values(), ({}, {})]:
            job = engine.submit(request(prompt, max_tokens=size, **rule_ours))
            jobs.append((job, plain(prompt, size, **rule_theirs)))
    found = drain(engine, 2)
    assert found[whole.id, 0] == (plain(REPETITIVE, 25, **theirs), "length")
    for job, ids in jobs:
        assert found[job.id, 0] == (ids, "length"), job.request


def test_ids_that_end_a_text_end_it_but_not_before_min_tokens(engine):
    free = plain(SHORT)
    end_id = free[2]
    first = free.index(end_id) + 1
    ending = make(eos_ids=(30, end_id))
    texts = {
        "eos": ending.submit(request()),
        "ignored": ending.submit(request(ignore_eos=True)),
        "early": ending.submit(request(min_tokens=first)),
    }
    other = engine.submit(request(stop_ids=(29, end_id)))
    found = drain(ending)
    assert found[texts["eos"].id, 0] == (free[:first], "stop")
    assert found[texts["ignored"].id, 0] == (free, "length")
    later = plain(SHORT, end_id=end_id, min_tokens=first)
    assert found[texts["early"].id, 0][0] == later and len(later) > first
    assert drain(engine)[other.id, 0] == (free[:first], "stop")


def test_a_sampled_text_is_the_same_alone_and_in_a_crowd(engine):
    asked = request(LONG, temperature=1.2, top_p=0.9, seed=11, n=2)
    job = engine.submit(asked)
    alone = drain(engine)
    hot = dict(temperature=2.0, top_p=0.8)
    others = [engine.submit(request(LONG[:15], max_tokens=3 + i, **hot)) for i in range(3)]
    engine.step(2)
    late = engine.submit(asked)
    others += [engine.submit(request(LONG[:9], seed=i, n=2, **hot)) for i in range(3)]
    crowd = drain(engine, 3)
    assert [crowd[late.id, n] for n in (0, 1)] == [alone[job.id, n] for n in (0, 1)]
    assert alone[job.id, 0] != alone[job.id, 1]
    assert len(others) == 6


def test_a_prompt_in_chunks_gives_what_it_gives_at_once(engine):
    short = request(SHORT, max_tokens=9, top_logprobs=3)
    long = request(LONG, top_logprobs=3, prompt_logprobs=True)
    tokens = {}
    beside, whole = engine.submit(short), engine.submit(long)
    drain_tokens(engine, tokens)
    chunked = make(prefill_chunk=8)
    running, parts = chunked.submit(short), chunked.submit(long)
    # The text that runs goes on while the other's prompt is read.
    seen = []
    for _ in range(4):
        seen.append(chunked.step(1))
    assert [{job.id for job, _ in new} for new in seen] == [{running.id}] * 3 + [
        {running.id, parts.id}
    ]  # fmt: skip
    drain_tokens(chunked, tokens, seen)
    for one_way, other in ((beside, running), (whole, parts)):
        check_alike(tokens[id(one_way)], tokens[id(other)])
    check_alike(whole.prompt_tokens[1:], parts.prompt_tokens[1:])


def check_alike(tokens, others):
    for one_way, other in zip(tokens, others, strict=True):
        np.testing.assert_allclose(one_way.logprob, other.logprob, atol=1e-5)
        assert one_way.id == other.id
        assert [i for i, _ in one_way.top] == [i for i, _ in other.top]


def drain_tokens(engine, into, begun=()):
    """Tokens of (job's id, sample), those of `begun` steps too."""
    steps = [*begun]
    while not engine.idle:
        steps.append(engine.step())
    for job, output in (pair for new in steps for pair in new):
        into[id(job)] = into.get(id(job), ()) + output.tokens


def test_log_probabilities_are_those_of_the_whole_forward(engine):
    prompts = [LONG[:7], LONG[:2], LONG[:1], LONG]
    jobs = [
        engine.submit(request(p, max_tokens=0, prompt_logprobs=True, top_logprobs=k))
        for k, p in enumerate(prompts)
    ]
    # To be scored a text may fill the context.
    full = engine.submit(request((LONG * 2)[:SEQ_LEN], max_tokens=0, prompt_logprobs=True))
    written = [engine.submit(request(LONG[:7], top_logprobs=k)) for k in (4, 2)]
    tokens = {}
    drain_tokens(engine, tokens)
    assert tokens[id(full)] == () and len(full.prompt_tokens) == SEQ_LEN
    for k, job in enumerate(jobs):
        first, *others = job.prompt_tokens
        assert first is None and tokens[id(job)] == ()
        check_logprobs(job.request.prompt, 1, others, k)
    for job, k in zip(written, (4, 2), strict=True):
        new = tokens[id(job)]
        check_logprobs([*LONG[:7], *(token.id for token in new)], 7, new, k)


def check_logprobs(ids, start, tokens, k):
    logits_TV = forward(CONFIG)(list(ids))
    expected_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    assert [token.id for token in tokens] == list(ids[start:])
    for place, token in enumerate(tokens, start):
        at_V = expected_TV[place - 1]
        np.testing.assert_allclose(token.logprob, at_V[token.id], atol=2e-5)
        likeliest = np.argsort(-at_V[:VOCAB_SIZE])[:k].tolist()
        assert [i for i, _ in token.top] == likeliest
        np.testing.assert_allclose([p for _, p in token.top], at_V[likeliest], atol=2e-5)


def test_samples_share_one_reading_and_do_not_depend_on_the_number_of_places(engine):
    asked = request(LONG[:9], n=6, temperature=1.5, top_p=0.99, seed=3)
    wide = engine.submit(asked)
    found = drain(engine)
    few = make(max_slots=2)
    narrow = few.submit(asked)
    fewer = drain(few)
    assert [fewer[narrow.id, n] for n in range(6)] == [found[wide.id, n] for n in range(6)]
    assert len({tuple(found[wide.id, n][0]) for n in range(6)}) == 6
    stats = few.stats()
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (9, 60)


def test_cancelled_and_ended_texts_free_their_places_at_once():
    engine = make(max_slots=2)
    first, second, third, fourth = (engine.submit(request(max_tokens=20)) for _ in range(4))
    assert {job.id for job, _ in engine.step(1)} == {first.id, second.id}
    assert engine.stats()["free_slots"] == 0 and engine.stats()["waiting"] == 2
    engine.cancel(first)
    engine.cancel(third)
    assert engine.stats()["free_slots"] == 1
    assert {job.id for job, _ in engine.step(1)} == {second.id, fourth.id}
    engine.end(second, 0)
    assert engine.stats()["running"] == 1
    found = drain(engine)
    assert set(found) == {(fourth.id, 0)} and len(found[fourth.id, 0][0]) == 19
    # A prompt that is being read; a sample that has no place yet.
    chunked = make(prefill_chunk=8, max_slots=2)
    reading = chunked.submit(request(LONG))
    chunked.step(1)
    chunked.cancel(reading)
    assert chunked.idle
    several = chunked.submit(request(n=3))
    chunked.step(1)
    chunked.end(several, 2)
    assert set(drain(chunked)) == {(several.id, 0), (several.id, 1)}
    several = chunked.submit(request(n=3))
    chunked.step(1)
    chunked.cancel(several)
    assert chunked.idle


def test_who_waits_comes_in_turn_and_the_queue_has_an_end():
    engine = make(max_slots=1, max_waiting=2)
    jobs = [engine.submit(request((i, *SHORT))) for i in range(3)]
    with pytest.raises(QueueFull, match="3 requests wait"):
        engine.submit(request())
    assert list(drain(engine)) == [(job.id, 0) for job in jobs]
    engine.submit(request())


def test_a_place_holds_nothing_of_its_last_text_not_even_nan(engine):
    expected = one(engine)
    engine._slots._state = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, engine._slots._state
    )
    assert one(engine) == expected


def test_the_batch_grows_and_shrinks_with_what_runs(monkeypatch):
    monkeypatch.setattr(slots, "_SHORTEST", 16)
    monkeypatch.setattr(slots, "_AHEAD", 4)
    monkeypatch.setattr(slots, "_PATIENCE", 6)
    engine = make(max_slots=4)
    long = engine.submit(request((8,), max_tokens=28))
    expected = plain((8,), 28)
    shapes, ids = [], []

    def step():
        for job, output in engine.step(2):
            if job is long:
                ids.extend(token.id for token in output.tokens)
        shapes.append((engine._slots.shape.rows, engine._slots.shape.length))

    step()
    for i in range(2):
        engine.submit(request((i, *LONG[:15]), max_tokens=3))
    while not engine.idle:
        step()
    assert ids == expected
    grown = [shape for i, shape in enumerate(shapes) if not i or shape != shapes[i - 1]]
    assert grown == [(1, 16), (4, 32), (1, 16), (1, 32)]
    # An empty batch begins with what is needed.
    engine.submit(request((8,)))
    engine.step()
    assert engine._slots.shape == slots.Shape(1, 16)


class Alternating:
    """Odd ids, then even ones, in turn; after six tokens the end."""

    failure = ""

    def __init__(self):
        self.ids = []

    def allowed(self):
        allowed_V = np.arange(VOCAB_SIZE) % 2 != len(self.ids) % 2
        return allowed_V if len(self.ids) < 6 else np.arange(VOCAB_SIZE) == 30

    def accept(self, token_id):
        assert self.allowed()[token_id]
        self.ids.append(token_id)


class Nothing(Alternating):
    def allowed(self):
        return super().allowed() & (len(self.ids) < 2)


def test_a_constraint_is_kept_to_and_hinders_no_neighbour():
    engine = make(eos_ids=(30,))
    tied = engine.submit(request(constraint=Alternating, max_tokens=12))
    stuck = engine.submit(request(constraint=Nothing, max_tokens=12))
    free = engine.submit(request(ignore_eos=True))
    found = drain(engine, 16)
    ids, reason = found[tied.id, 0]
    assert reason == "stop" and ids[-1] == 30
    assert [i % 2 for i in ids] == [1, 0, 1, 0, 1, 0, 0]
    assert (len(found[stuck.id, 0][0]), found[stuck.id, 0][1]) == (2, "stop")
    assert found[free.id, 0] == (plain(SHORT), "length")


def test_known_beginnings_are_not_read_again_and_change_nothing(monkeypatch):
    monkeypatch.setattr(prefixes, "MIN_COMMON", 6)
    engine = make(prefix_cache_tokens=48)
    prompts = [LONG[:20], (*LONG[:12], 1, 2, 3), LONG[:20], (1, *LONG[:10]), LONG[:9]]
    cached = []
    for prompt in prompts:
        job, tokens = engine.submit(request(prompt)), {}
        drain_tokens(engine, tokens)
        check_logprobs([*prompt, *plain(prompt)], len(prompt), tokens[id(job)], 0)
        cached.append(job.cached_tokens)
    assert cached == [0, 12, 19, 0, 8]
    stats = engine.stats()
    assert (stats["prefix_hits"], stats["cached_tokens"]) == (3, 39)
    assert engine._reader.prefixes.num_places <= 48
    # Those of many other prompts take its place.
    for i in range(2, 5):
        engine.submit(request([i] * 18))
        drain(engine)
    job = engine.submit(request(LONG[:20]))
    drain(engine)
    assert job.cached_tokens == 0


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(prompt=()), "prompt: 0 tokens"),
        (dict(prompt=[1] * 32), "prompt: 32 tokens are not fewer than the model's context of 32"),
        (dict(prompt=[1] * 33, max_tokens=0), "prompt: 33 tokens are not at most"),
        (dict(prompt=[31]), "prompt: 31 is not an id from 0 to 30"),
        (dict(logit_bias=((31, 1.0),)), "logit_bias: 31 is not an id from 0 to 30"),
    ],
)
def test_what_cannot_be_served_is_refused(engine, values, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request(**values))
    assert engine.idle


def test_only_who_reads_from_left_to_right_scores_a_prompt():
    config = dataclasses.replace(CONFIG, read_prompts_whole=True)
    engine = Engine(Transformer(config), params_for(config))
    with pytest.raises(ValueError, match="prompt_logprobs: this model does not read"):
        engine.submit(request(prompt_logprobs=True))
    with pytest.raises(ValueError, match="max_slots: 0 is not at least 1"):
        make(max_slots=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(8, 1, 1), (2, 1, 4), (1, 4, 2)], ids=["data", "data-tensor", "fsdp-tensor"]
)
def test_on_a_mesh_it_gives_what_it_gives_on_one_device(sizes):
    # Of 4 key/value heads, 4 or 2 devices of the axis "tensor" hold as many each; keys in pages.
    config = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=4)
    model = Transformer(config)
    mesh = make_mesh(MeshConfig(*sizes))
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    placed = jax.device_put(params_for(config), param_shardings(boxed, mesh))
    prompts, values = [LONG, SHORT, LONG[:2], LONG[:9]], dict(temperature=1.0, no_repeat_ngram=3)
    found = []
    for params in (params_for(config), placed):
        engine = Engine(model, params, vocab_size=VOCAB_SIZE, prefill_chunk=16)
        asked = [request(p, n=2, repetition_penalty=1.2, **values) for p in prompts]
        jobs = [engine.submit(each) for each in asked]
        begun = []
        for _ in range(4):
            begun.append(engine.step(2))
        keys = engine._slots._state.cache.layers.k_BKSH.rows_BKRC
        shape = keys.sharding.shard_shape(keys.shape)
        assert engine._slots.shape.rows == 8
        tokens = {}
        drain_tokens(engine, tokens, begun)
        found.append([tokens[id(job)] for job in jobs])
    rows, heads = shape[1:3]
    assert (rows, heads) == (8 // (sizes[0] * sizes[1]), 4 // sizes[2])
    for one_device, many in zip(*found, strict=True):
        assert [t.id for t in one_device] == [t.id for t in many]
        for ours, theirs in zip(one_device, many, strict=True):
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=2e-5)
