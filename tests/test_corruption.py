"""What objectives do to rows of tokens: rates, exactness, and that nothing gets lost."""

import numpy as np
import pytest

from gpt_jax.data import spans
from gpt_jax.data.infilling import fill_in_the_middle, rearrange
from gpt_jax.data.masking import masked_lm
from gpt_jax.data.packing import make_batch
from gpt_jax.data.permutation import NEVER_A_KEY, num_predicted, permutation_lm
from gpt_jax.data.prefixes import prefix_lm, prefix_ranks
from gpt_jax.data.segments import segment_row, split_row

EOS, MASK, CLS, VOCAB = 0, 1, 2, 200
SPECIAL = np.arange(20)  # with sentinels 3..12 and infilling 13, 14, 15
INFILLING = (13, 14, 15)


def rng(seed=0):
    return np.random.default_rng(seed)


def a_row(seed=0, length=65, documents=(0, 20, 50)):
    """`length` distinct ordinary tokens, but for the end-of-text tokens that begin documents."""
    row = rng(seed).permutation(np.arange(20, VOCAB))[:length].astype(np.int32)
    row[[start for start in documents if start < length]] = EOS
    return row


def within(count, total, share):
    """Whether a count is within 4 standard deviations of a binomial's mean."""
    return abs(count - total * share) < 4 * np.sqrt(total * share * (1 - share))


def mask_row(tokens, generator, mask_rate=0.15, mask_share=0.8, random_share=0.1):
    return masked_lm(
        tokens, generator, mask_rate=mask_rate, mask_share=mask_share, random_share=random_share,
        mask_id=MASK, ordinary_ids=np.arange(20, VOCAB), eos_id=EOS,
    )  # fmt: skip


def test_masking_rates():
    tokens = np.tile(a_row(length=64), 50)
    tokens[3] = CLS
    records = [mask_row(tokens, rng(seed)) for seed in range(20)]
    masked, random, kept, ordinary = 0, 0, 0, 0
    for record in records:
        chosen = record["loss_mask"] == 1
        assert not chosen[tokens < 20].any()  # end-of-text, [CLS]
        np.testing.assert_array_equal(record["targets"], tokens)
        np.testing.assert_array_equal(record["tokens"][~chosen], tokens[~chosen])
        drawn = record["tokens"][chosen]
        assert ((drawn == MASK) | (drawn >= 20)).all()
        ordinary += (tokens >= 20).sum()
        masked += (drawn == MASK).sum()
        kept += (drawn == tokens[chosen]).sum()
        random += ((drawn != MASK) & (drawn != tokens[chosen])).sum()
    total = masked + random + kept
    same = 1 / 180  # a random token is the original by chance
    assert within(total, ordinary, 0.15)
    assert within(masked, total, 0.8)
    assert within(random, total, 0.1 * (1 - same))
    assert within(kept, total, 0.1 * (1 + same))


def test_masking_documents_and_ranks():
    tokens = a_row(length=64)
    record = mask_row(tokens, rng(), mask_rate=0.9)
    positions, segment_ids = segment_row(tokens, EOS)
    np.testing.assert_array_equal(record["positions"], positions)
    np.testing.assert_array_equal(record["segment_ids"], segment_ids)
    assert not record["key_ranks"].any() and not record["query_ranks"].any()


def test_segments_are_those_of_packed_batches():
    row = a_row(documents=(5, 6, 40))
    batch = make_batch([row], 64, EOS)
    for array, name in zip(segment_row(row[:-1], EOS), ("positions", "segment_ids"), strict=True):
        np.testing.assert_array_equal(array, batch[name][0])
    np.testing.assert_array_equal(np.concatenate(split_row(row, EOS)), row)
    assert [len(document) for document in split_row(row, EOS)] == [5, 1, 34, 25]


@pytest.mark.parametrize("mask_rate, mean_span", [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.9, 2.0)])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
def test_span_counts_are_exact(length, mask_rate, mean_span):
    longest = spans.span_lengths(64, mask_rate, mean_span)
    for seed in range(20):
        mask = spans.noise_mask(length, rng(seed), mask_rate, mean_span)
        noise, number = spans.num_noise_and_spans(length, mask_rate, mean_span)
        assert mask.shape == (length,) and not mask[0]
        assert mask.sum() == noise
        assert (np.diff(mask.astype(int)) == 1).sum() == number
        if length > 3:
            assert noise == round(length * mask_rate)
        sentinels = np.arange(1000, 1100)
        lengths = tuple(map(len, spans.corrupt_spans(np.arange(length), mask, sentinels, EOS)))
        assert lengths == spans.span_lengths(length, mask_rate, mean_span)
        assert lengths[0] <= longest[0] and lengths[1] <= longest[1]


def test_spans_are_where_chance_wants():
    share = np.mean([spans.noise_mask(20, rng(seed), 0.3, 2.0) for seed in range(2000)], axis=0)
    # The first token always stays, the last never does; in between no place is preferred much.
    assert share[0] == 0 and share[-1] == 1
    assert (share[2:-2] > 0.15).all() and (share[2:-2] < 0.4).all()


def permute(tokens, seed, predict_share=1 / 6):
    return permutation_lm(
        tokens, rng(seed), predict_share=predict_share, mask_id=MASK, special_ids=SPECIAL,
        eos_id=EOS,
    )  # fmt: skip


def visible(record):
    """Who sees whom, bool[queries, keys], as the model's attention decides it."""
    segments, keys, queries = (record[k] for k in ("segment_ids", "key_ranks", "query_ranks"))
    return (segments[:, None] == segments) & (keys <= queries[:, None])


@pytest.mark.parametrize("documents", [(0,), (0, 20, 50), (3, 4, 30, 31, 62)])
@pytest.mark.parametrize("predict_share", [1 / 6, 0.9])
def test_permuted_tokens_see_what_is_before_them(documents, predict_share):
    for seed in range(5):
        tokens = a_row(seed, 64, documents)
        record = permute(tokens, seed, predict_share)
        k = num_predicted(64, predict_share)
        assert record["tokens"].shape == (64 + k,)
        np.testing.assert_array_equal(record["tokens"], [*tokens, *[MASK] * k])
        order = record["key_ranks"][:64]
        np.testing.assert_array_equal(np.sort(order), np.arange(64))
        assert set(order[tokens == EOS]) == set(range(len(documents)))  # special tokens come first
        predicted = np.flatnonzero(order >= 64 - k)  # the queries, by their places
        np.testing.assert_array_equal(record["targets"][64:], tokens[predicted])
        np.testing.assert_array_equal(record["positions"][64:], record["positions"][predicted])
        sees = visible(record)
        assert not sees[:, 64:].any()
        segments = segment_row(tokens, EOS)[1]
        same = segments[:, None] == segments
        np.testing.assert_array_equal(sees[:64, :64], same & (order <= order[:, None]))
        before = same & (order < order[:, None])
        np.testing.assert_array_equal(sees[64:, :64], before[predicted])
        # What counts: every query that sees something and whose token is ordinary.
        assert not record["loss_mask"][:64].any()
        counts = before[predicted].any(1) & (tokens[predicted] >= 20)
        np.testing.assert_array_equal(record["loss_mask"][64:], counts)
        assert (record["key_ranks"][64:] == NEVER_A_KEY).all()


def test_a_query_that_sees_nothing_does_not_count():
    # The first document has no end-of-text token in front: one of its tokens comes first of all.
    tokens = np.array([30, 31, EOS, 33, 34])
    for seed in range(20):
        record = permute(tokens, seed, 0.8)
        blind = ~visible(record)[5:].any(1)
        assert blind.sum() == 1 and record["segment_ids"][5:][blind] == 1
        assert (record["loss_mask"][5:][blind] == 0).all()
        assert (record["loss_mask"][5:][~blind] == 1).all()


def test_permutation_of_one_token_and_the_least_share():
    assert num_predicted(1, 0.5) == 0 and num_predicted(2, 0.9) == 1
    assert num_predicted(60, 1 / 6) == 10 and num_predicted(10, 0.01) == 1
    assert permute(np.array([30]), 0)["tokens"].tolist() == [30]


def undo(document):
    """Prefix, middle and suffix of a rearranged document, and its order."""
    first, second, third = INFILLING
    document = document.tolist()
    assert document[0] == first
    two, three = document.index(second), document.index(third)
    order = "SPM" if two == 1 else "PSM"
    head, suffix, tail = document[1:two], document[two + 1 : three], document[three + 1 :]
    return order, head, tail, suffix


def test_infilling_can_be_undone():
    body = np.arange(20, 50)
    orders = []
    for seed in range(400):
        document = rearrange(body, rng(seed), 0.3, INFILLING)
        assert len(document) == len(body) + 3
        order, prefix, rest, suffix = undo(document)
        orders.append(order)
        # In SPM the text before the suffix stands whole behind <middle>.
        np.testing.assert_array_equal(prefix + rest + suffix, body)
        assert order == "PSM" or not prefix
    assert within(orders.count("SPM"), 400, 0.3)
    cuts = [len(undo(rearrange(body, rng(seed), 0.0, INFILLING))[1]) for seed in range(400)]
    assert min(cuts) == 0 and max(cuts) > 20  # cuts fall anywhere


def infill(row, seed, fim_rate):
    return fill_in_the_middle(
        row, rng(seed), fim_rate=fim_rate, fim_spm_rate=0.5, sentinels=INFILLING, eos_id=EOS
    )


def test_infilling_of_a_row():
    row = a_row(documents=(7, 20, 21, 64))
    changed = 0
    for seed in range(200):
        record = infill(row, seed, 0.5)
        whole = np.append(record["tokens"], record["targets"][-1])
        assert len(whole) == len(row) and record["loss_mask"].all()
        np.testing.assert_array_equal(record["tokens"][1:], record["targets"][:-1])
        for old, new in zip(split_row(row, EOS), split_row(whole, EOS), strict=False):
            head = int(old[0] == EOS)
            if len(new) == len(old) + 3:
                np.testing.assert_array_equal(new[:head], old[:head])
                _, prefix, rest, suffix = undo(new[head:])
                np.testing.assert_array_equal(prefix + rest + suffix, old[head:])
        changed += INFILLING[0] in whole[:7]
    assert within(changed, 200, 0.5)
    np.testing.assert_array_equal(infill(row, 0, 0.0)["tokens"], row[:-1])


def test_prefixes():
    row = a_row(documents=(7, 20, 21))
    lengths = {1: [], 2: [], 3: [], 4: []}
    for seed in range(300):
        record = prefix_lm(row, rng(seed), eos_id=EOS)
        np.testing.assert_array_equal(record["tokens"], row[:-1])
        np.testing.assert_array_equal(record["targets"], row[1:])
        for segment, drawn in lengths.items():
            here = record["segment_ids"] == segment
            counted, ranks = record["loss_mask"][here], record["query_ranks"][here]
            prefix = int((counted == 0).sum()) + 1
            drawn.append(prefix)
            assert counted[prefix - 1 :].all()
            np.testing.assert_array_equal(ranks, prefix_ranks(np.arange(here.sum()), prefix))
        sees = visible(record)
        # Nobody whose target counts sees it: it is the input one place on.
        counted = np.flatnonzero(record["loss_mask"][:-1])
        same = record["segment_ids"][counted] == record["segment_ids"][counted + 1]
        assert not sees[counted, counted + 1][same].any()
    assert set(lengths[1]) == set(range(1, 8)) and set(lengths[3]) == {1}


def test_the_convention_of_a_prefix():
    np.testing.assert_array_equal(prefix_ranks(np.arange(6), 4), [0, 0, 0, 1, 2, 3])
    # A prefix of one token is causal.
    np.testing.assert_array_equal(prefix_ranks(np.arange(3), 1), [1, 2, 3])
