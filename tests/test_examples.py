"""From records to batches: nothing lost or mixed up, and a mixture that is a pure function."""

import numpy as np
import pytest

from gpt_jax.data.examples import CorruptedRows, ExampleRows, Layout, pack_records
from gpt_jax.data.mixture import Mixture, mixture_weights
from gpt_jax.data.order import MIXTURE_PERIOD, global_rows, mixed_rows, mixture_counts

SHAPES = [Layout(32), Layout(32, source_len=24)]
# Some fit many to a row, and some leave so little that more rows are open than are looked at.
LENGTHS = {"short": (1, 12), "any": (1, 33), "long": (17, 33)}


def make_record(number, length, source_length=0):
    """A record whose tokens say which one it is."""
    tokens = 100 * number + np.arange(1, length + 1, dtype=np.int32)
    record = {"tokens": tokens, "targets": tokens + 50, "loss_mask": (tokens % 3 > 0) * 1.0}
    if source_length:
        record["encoder_tokens"] = -tokens[0] - np.arange(source_length, dtype=np.int32)
    return record


def make_records(number, lengths=(1, 12), source=False, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(*lengths, (number, 2))
    return [make_record(i, n, min(m, 24) if source else 0) for i, (n, m) in enumerate(sizes, 1)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def unpack(batch, prefix=""):
    """The documents of a batch in order, each one segment: the places of its row."""
    for i, segments in enumerate(batch[f"{prefix}segment_ids"]):
        assert set(segments) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            yield i, segment, np.flatnonzero(segments == segment)


@pytest.mark.parametrize("layout", SHAPES, ids=["decoder", "encoder_decoder"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packing_keeps_every_record_once_and_whole(layout, lengths):
    records = make_records(200, lengths, source=layout.source_len > 0)
    rows = ExampleRows(records, layout, pack=True)
    batch = rows.batch(range(len(rows)))
    seen = []
    for i, segment, places in unpack(batch):
        record = records[batch["tokens"][i, places[0]] // 100 - 1]
        seen.append(record["tokens"][0])
        assert (np.diff(places) == 1).all()
        for name in ("tokens", "targets", "loss_mask"):
            np.testing.assert_array_equal(batch[name][i, places], record[name])
        np.testing.assert_array_equal(batch["positions"][i, places], np.arange(len(places)))
        if layout.source_len:  # cross attention stays within a segment id
            source = np.flatnonzero(batch["encoder_segment_ids"][i] == segment)
            np.testing.assert_array_equal(
                batch["encoder_tokens"][i, source], record["encoder_tokens"]
            )
            np.testing.assert_array_equal(
                batch["encoder_positions"][i, source], np.arange(len(source))
            )
    assert sorted(seen) == [record["tokens"][0] for record in records]
    for name, array in batch.items():
        assert array.shape[1] == (layout.source_len if "encoder" in name else 32)
        source = "encoder_" if name.startswith("encoder_") else ""
        assert not array[batch[f"{source}segment_ids"] == 0].any()


def test_packing_fills_rows_the_same_way_each_time():
    records = make_records(300)
    rows = pack_records(records, Layout(32))
    assert rows == pack_records(records, Layout(32))
    assert sorted(number for row in rows for number in row) == list(range(300))
    tokens = sum(len(record["tokens"]) for record in records)
    assert tokens / (32 * len(rows)) > 0.95
    # To the last place; the fullest of too many open rows is not looked at any more.
    lengths = [20, *[17] * 65, 15, 12]
    rows = pack_records([make_record(1, n) for n in lengths], Layout(32))
    assert rows == [[0], [1], [2, 66], [3, 67], *([i] for i in range(4, 66))]
    assert len(ExampleRows(records, Layout(32))) == 300  # unpacked


def test_what_a_record_says_stands_and_the_rest_follows_from_one_document():
    two = make_record(1, 4) | {"segment_ids": np.array([1, 1, 2, 2]), "key_ranks": np.arange(4)}
    two["positions"] = np.array([0, 1, 0, 1])
    one = make_record(2, 3) | {"key_ranks": np.zeros(3, np.int32)}
    batch = Layout(9).collate([[two, one], [one]])
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 3, 3, 3, 0, 0], [1, 1, 1] + [0] * 6]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0, 1, 2, 0, 0], [0, 1, 2] + [0] * 6]
    assert batch["key_ranks"][0].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0]
    assert batch["loss_mask"].dtype == np.float32 and batch["tokens"].dtype == np.int32
    # A segment that a record marks as padding stays padding.
    padded = make_record(3, 3) | {"segment_ids": np.array([1, 1, 0])}
    padded = Layout(6).collate([[make_record(4, 3), padded]])
    assert padded["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0]]


@pytest.mark.parametrize("target", [np.int32(3), np.float32(0.7), np.array([2, 5], np.int32)])
def test_targets_of_a_whole_row(target):
    record = make_record(1, 5) | {"targets": target, "loss_mask": np.ones_like(target, np.float32)}
    rows = ExampleRows([record] * 3, Layout(8, row_targets=True))
    batch = rows.batch([0, 7, 2])
    assert batch["targets"].dtype == target.dtype and batch["loss_mask"].dtype == np.float32
    np.testing.assert_array_equal(batch["targets"], [target, 0 * target, target])
    assert batch["loss_mask"].sum() == 2 * np.size(target)
    assert rows.num_tokens == 3 * np.size(target)


@pytest.mark.parametrize("layout", SHAPES, ids=["decoder", "encoder_decoder"])
def test_rows_outside_are_padding(layout):
    rows = ExampleRows(make_records(5, source=layout.source_len > 0), layout)
    batch, alone = rows.batch([3, -1, 5]), rows.batch([3])
    for name, array in batch.items():
        np.testing.assert_array_equal(array[:1], alone[name])
        assert not array[1:].any()
    padding = rows.batch([5, -1, 99])
    assert_same(padding, {name: np.zeros_like(array) for name, array in batch.items()})


def test_row_tokens_are_what_is_read():
    records = [make_record(1, 3, 2), make_record(2, 2, 1)]
    rows = ExampleRows(records, Layout(8, 8), pack=True)
    assert len(rows) == 1 and rows.num_documents == 2
    assert rows.row_tokens(0).tolist() == [-101, -102, 101, 102, 103, -201, 201, 202]


def test_fingerprints_change_with_whatever_changes_a_batch():
    def fingerprint(changes=None, layout=None, **arguments):
        records = make_records(6)
        records[2] |= changes or {}
        return ExampleRows(records, layout or Layout(32), **arguments).fingerprint

    third = make_records(6)[2]
    token, weight = third["tokens"].copy(), third["loss_mask"].copy()
    token[-1] += 1
    weight[-1] = 0.5
    assert fingerprint() == fingerprint()
    different = [
        fingerprint(),
        fingerprint({"tokens": token}),
        fingerprint({"loss_mask": weight}),
        fingerprint({"key_ranks": token}),
        fingerprint(layout=Layout(31)),
        fingerprint(layout=Layout(32, 32)),
        fingerprint(pack=True),
        ExampleRows(make_records(6)[::-1], Layout(32)).fingerprint,
    ]
    assert len(set(different)) == len(different)


def shuffled(tokens, generator):
    """A corruption that draws, of a length that it draws too."""
    kept = generator.permutation(tokens)[: generator.integers(1, len(tokens) + 1)]
    return {"tokens": kept, "targets": kept, "loss_mask": np.ones(len(kept))}


def test_a_corruption_belongs_to_seed_epoch_and_row_alone():
    rows = ExampleRows(make_records(20, (10, 30)), Layout(32))

    def one(row, epoch, seed=3):
        return CorruptedRows(rows, shuffled, Layout(32), seed).batch([row], [epoch])

    corrupted = CorruptedRows(rows, shuffled, Layout(32), 3)
    numbers, epochs = [7, 0, 99, 7, 19], [0, 2, 0, 1, 2**40]
    batch = corrupted.batch(np.array(numbers), np.array(epochs))
    for i in (0, 1, 3, 4):
        assert_same({k: v[i : i + 1] for k, v in batch.items()}, one(numbers[i], epochs[i]))
    assert not any(array[2].any() for array in batch.values())
    # Another epoch, seed or row draws anew; evaluation is epoch 0.
    drawn = [one(7, 0), one(7, 1), one(7, 0, seed=4), one(0, 7), one(8, 0)]
    assert len({b["tokens"].tobytes() for b in drawn}) == len(drawn)
    assert_same(corrupted.batch([7]), one(7, 0))
    assert_same(corrupted.batch([20]), {k: 0 * v for k, v in one(7, 0).items()})
    np.testing.assert_array_equal(corrupted.row_tokens(7), rows.row_tokens(7))
    assert len(corrupted) == 20 and corrupted.fingerprint == rows.fingerprint


def test_what_a_corruption_draws_never_changes():
    """As with the order of mixtures: a run that is resumed goes on with the same corruption."""
    rows = ExampleRows(make_records(20), Layout(32))

    def draw(tokens, generator):
        return {name: generator.integers(1000, size=3) for name in ("tokens", "targets")} | {
            "loss_mask": np.ones(3)
        }

    batch = CorruptedRows(rows, draw, Layout(3), 5).batch([4, 7], [2, 0])
    assert batch["tokens"].tolist() == DRAWN


@pytest.mark.parametrize(
    "weights",
    [(1, 1, 1), (5, 1, 2), (0.3, 0.7), (1e9, 1, 1), (1e-9, 1e-9), (1e6, *[1] * 900), (1, 999.6)],
)
def test_counts_fill_the_period_in_proportion(weights):
    counts = np.array(mixture_counts(weights))
    assert counts.sum() == MIXTURE_PERIOD and counts.min() >= 1
    exact = np.array(weights) / sum(weights) * MIXTURE_PERIOD
    if exact.min() >= 1:
        assert (np.abs(counts - exact) < 1).all()
    assert (np.diff(counts[np.argsort(weights)]) >= -1).all()


def test_one_component_has_the_only_place():
    assert mixture_counts((0.2,)) == (1,)


def test_weights_by_size():
    sizes = [100, 400, 900]
    assert mixture_weights(sizes, 1.0, 0) == (100, 400, 900)
    assert mixture_weights(sizes, 2.0, 0) == (10, 20, 30)
    assert mixture_weights(sizes, 2.0, 400) == (10, 20, 20)
    assert mixture_weights(sizes, 1e9, 0) == pytest.approx((1, 1, 1))


SIZES, WEIGHTS = (7, 3, 50), (5, 1, 2)
COUNTS = mixture_counts(WEIGHTS)


def stream(batch_size, places, seed=0, first=0):
    """int64[3, places]: component, epoch and row, from batch `first` on."""
    batches = [
        mixed_rows(seed, SIZES, COUNTS, batch_size, first + i) for i in range(places // batch_size)
    ]
    return np.concatenate(batches, axis=1)


def test_whole_periods_have_exact_proportions_and_whole_epochs():
    component, epoch, row = stream(500, 4 * MIXTURE_PERIOD)
    for periods in (1, 3, 4):
        shares = np.bincount(component[: periods * MIXTURE_PERIOD])
        np.testing.assert_array_equal(shares, periods * np.array(COUNTS))
    for c, size in enumerate(SIZES):
        epochs, rest = divmod(4 * COUNTS[c], size)
        for number in range(epochs):
            rows = row[(component == c) & (epoch == number)]
            np.testing.assert_array_equal(np.sort(rows), np.arange(size))
        last = row[(component == c) & (epoch == epochs)]
        assert len(last) == rest == len(set(last))
    # Each period gives its places out anew, and evenly.
    periods = component.reshape(4, MIXTURE_PERIOD)
    assert len({period.tobytes() for period in periods}) == 4
    assert np.bincount(periods[0, :500]) == pytest.approx(np.array(COUNTS) / 2, abs=50)


def test_the_stream_does_not_depend_on_batch_size_or_start():
    whole = stream(2100, 2100)
    assert whole.dtype == np.int64
    for batch_size in (7, 300, 1050):
        np.testing.assert_array_equal(stream(batch_size, 2100), whole)
    np.testing.assert_array_equal(stream(1, 20, first=995), whole[:, 995:1015])
    np.testing.assert_array_equal(stream(100, 400, first=9), whole[:, 900:1300])
    assert (stream(2100, 2100, seed=1) != whole).any()


def test_one_component_is_the_plain_order():
    rows = np.concatenate([global_rows(5, 12, 8, i) for i in range(6)])
    component, epoch, row = mixed_rows(5, (12,), (1,), 48, 0)
    np.testing.assert_array_equal(row, rows)
    assert not component.any() and epoch.tolist() == [g // 12 for g in range(48)]


def test_the_first_component_keeps_its_order_and_the_second_has_another():
    component, _, row = mixed_rows(5, (50, 50), (1, 1), 200, 0)
    alone = global_rows(5, 50, 100, 0)
    np.testing.assert_array_equal(row[component == 0], alone)
    assert (row[component == 1] != alone).any()


def test_the_order_of_mixtures_never_changes():
    """These numbers are part of the contract: a run resumed with newer code reads on in order."""
    component, epoch, row = mixed_rows(7, SIZES, COUNTS, 8, 12345)
    assert [component.tolist(), epoch.tolist(), row.tolist()] == GOLDEN


def make_mixture(weights=WEIGHTS, change=0):
    parts = {
        name: ExampleRows(make_records(size, seed=i), Layout(32))
        for i, (name, size) in enumerate(zip("abc", SIZES, strict=True))
    }
    if change:
        parts["b"].records[0]["tokens"][0] += change
        parts["b"] = ExampleRows(parts["b"].records, Layout(32))
    return Mixture(parts, weights)


def test_a_host_reads_its_rows_of_the_whole():
    mixture = make_mixture()
    whole = mixture.batch(3, 40, 2)
    part, _, row = mixture.picks(3, 40, 2)
    assert set(part) == {0, 1, 2}
    rows = list(mixture.parts.values())
    for i in range(40):
        expected = rows[part[i]].batch([row[i]])
        assert_same({k: v[i : i + 1] for k, v in whole.items()}, expected)
    for local in (np.arange(20, 40), np.array([39, 0, 7]), np.flatnonzero(part == 1)):
        mine = mixture.batch(3, 40, 2, local)
        assert_same(mine, {name: array[local] for name, array in whole.items()})
    names = [f"{'abc'[p]}:{r}" for p, r in zip(part, row, strict=True)]
    assert mixture.describe(3, 40, 2) == names
    assert mixture.shares == {"a": 0.625, "b": 0.125, "c": 0.25}
    assert len(mixture) == mixture.num_documents == sum(SIZES)


def test_a_mixture_passes_epochs_on():
    rows = ExampleRows(make_records(5, (10, 30)), Layout(32))
    corrupted = CorruptedRows(rows, shuffled, Layout(32), 0)
    for parts in ({"a": corrupted}, {"a": corrupted, "b": rows}):
        mixture = Mixture(parts)
        part, epoch, row = mixture.picks(0, 64, 1)
        mine = part == 0
        batch = mixture.batch(0, 64, 1)
        assert epoch[mine].max() > 0
        assert_same(
            {name: array[mine] for name, array in batch.items()},
            corrupted.batch(row[mine], epoch[mine]),
        )


def test_fingerprints_of_mixtures():
    one = ExampleRows(make_records(4), Layout(32))
    assert Mixture({"a": one}).fingerprint == one.fingerprint
    assert Mixture({"a": one}).describe(0, 3, 0) == global_rows(0, 4, 3, 0).tolist()
    assert make_mixture().fingerprint == make_mixture((10, 2, 4)).fingerprint
    prints = [make_mixture(), make_mixture((5, 1, 3)), make_mixture(change=1)]
    assert len({mixture.fingerprint for mixture in prints}) == 3


GOLDEN = [
    [1, 2, 0, 0, 1, 0, 0, 0],
    [4095, 493, 8822, 8794, 4121, 8798, 8832, 8808],
    [1, 1, 1, 4, 1, 1, 2, 2],
]
DRAWN = [[161, 607, 945], [419, 257, 407]]
