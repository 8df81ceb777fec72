"""From an objective's config to what happens to a row, and the special tokens that it takes."""

import numpy as np
import pytest

from gpt_jax.objectives import transforms
from gpt_jax.objectives.config import READS, ObjectiveConfig

EOS, MASK, CLS, VOCAB = 0, 1, 2, 200
SENTINELS = np.arange(3, 13)
INFILLING = (13, 14, 15)
CORRUPTED = {
    "masked_lm": "encoder",
    "span_corruption": "encoder_decoder",
    "permutation_lm": "decoder",
    "prefix_lm": "decoder",
    "fill_in_the_middle": "decoder",
}


def rng(seed=0):
    return np.random.default_rng(seed)


def a_row(seed=0, length=65, documents=(0, 20, 50)):
    """`length` distinct ordinary tokens, but for the end-of-text tokens that begin documents."""
    row = rng(seed).permutation(np.arange(20, VOCAB))[:length].astype(np.int32)
    row[[start for start in documents if start < length]] = EOS
    return row


def token_id(name):
    known = {"<mask>": MASK, "[CLS]": CLS}
    known |= {f"<extra_id_{i}>": i + 3 for i in range(10)}
    known |= dict(zip(("<|fim_prefix|>", "<|fim_suffix|>", "<fim_middle>"), INFILLING, strict=True))
    return known.get(name)


def transform(name, seq_len=64, family=None):
    config = ObjectiveConfig(name)
    ids = transforms.special_ids(config, seq_len, token_id, EOS)
    return transforms.make_transform(config, ids, VOCAB, seq_len, family or CORRUPTED[name])


def restore(source, target):
    """The text that source and target stand for together."""
    assert source[-1] == target[-1] == EOS
    pieces, current = {}, None
    for token in target[:-1]:
        if token in SENTINELS:
            current = int(token)
            pieces[current] = []
        else:
            pieces[current].append(token)
    assert list(pieces) == SENTINELS[: len(pieces)].tolist()
    whole = []
    for token in source[:-1]:
        whole += pieces.pop(int(token)) if token in SENTINELS else [token]
    assert not pieces
    return np.array(whole)


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder"])
def test_span_corruption_can_be_undone(family):
    for seed in range(20):
        row = a_row(seed, documents=(1, 40))
        record = transform("span_corruption", family=family)(row, rng(seed))
        if family == "decoder":
            counted = record["loss_mask"] > 0
            whole = np.append(record["tokens"], record["targets"][-1])
            source, target = whole[: -counted.sum()], record["targets"][counted]
            np.testing.assert_array_equal(whole[-counted.sum() :], target)
            # The first target is predicted by the source's last token, whose rank is 1.
            ranks = record["key_ranks"]
            assert (ranks[: len(source) - 1] == 0).all() and ranks[len(source) - 1] == 1
        else:
            source, target = record["encoder_tokens"], record["targets"]
            np.testing.assert_array_equal(record["tokens"], [EOS, *target[:-1]])
            assert (record["encoder_segment_ids"] == 1).all() and record["loss_mask"].all()
        assert (record["segment_ids"] == 1).all()
        config, size = ObjectiveConfig("span_corruption"), len(record["tokens"])
        assert transforms.row_lengths(config, 64, family)[0] == size
        assert record["positions"].max() < transforms.num_positions(config, 64, family)
        np.testing.assert_array_equal(restore(source, target), row[:-1])


@pytest.mark.parametrize("name", CORRUPTED)
@pytest.mark.parametrize("length", [65, 18, 3, 2])
def test_every_transform_gives_rows_that_fit(name, length):
    family = CORRUPTED[name]
    row = a_row(length=length, documents=(1, 20))
    fields = [transform(name)(row, rng(seed)) for seed in (3, 3, 4)]
    for one, two in zip(fields[0].items(), fields[1].items(), strict=True):
        np.testing.assert_array_equal(one[1], two[1])  # chance is the generator's alone
    if length == 65:
        assert any((fields[0][k].shape, fields[0][k].tolist()) != (v.shape, v.tolist())
                   for k, v in fields[2].items())  # fmt: skip
    config = ObjectiveConfig(name)
    length, source_length = transforms.row_lengths(config, 64, family)
    sizes = {True: set(), False: set()}
    for field, array in fields[0].items():
        assert array.dtype == (np.float32 if field == "loss_mask" else np.int32), field
        sizes[field.startswith("encoder_")].add(array.shape)
    assert len(sizes[False]) == 1 and len(sizes[True]) == (name == "span_corruption")
    assert max(sizes[False])[0] <= length
    assert not sizes[True] or max(sizes[True])[0] <= source_length
    assert fields[0]["positions"].max() < transforms.num_positions(config, 64, family)
    if len(row) == 65:
        assert max(sizes[False])[0] == length


@pytest.mark.parametrize("name", sorted(set(READS) - set(CORRUPTED)))
def test_the_others_leave_rows_alone(name):
    config = ObjectiveConfig(name, teacher="run" if name == "distillation" else "")
    ids = transforms.special_ids(config, 64, lambda name: None, EOS)
    assert transforms.make_transform(config, ids, VOCAB, 64) is None
    assert transforms.row_lengths(config, 64) == (64, 0)
    assert not transforms.needed_tokens(config, 64)


def test_special_tokens_are_found_by_name():
    config = ObjectiveConfig("span_corruption")
    ids = transforms.special_ids(config, 64, token_id, EOS, start_id=9)
    assert ids.sentinels == (3, 4, 5) and ids.start == 9 and ids.no_text == (CLS,)
    assert transforms.needed_tokens(config, 64)[-1] == "<extra_id_2>"
    ids = transforms.special_ids(ObjectiveConfig("fill_in_the_middle"), 64, token_id, EOS)
    assert ids.infilling == INFILLING and ids.start == EOS
    names = {"[MASK]": 7}
    assert transforms.special_ids(ObjectiveConfig("masked_lm"), 64, names.get, EOS).mask == 7
    for name, missing in (
        ("masked_lm", r"'<mask>' or '\[MASK\]'"),
        ("span_corruption", r"'<extra_id_0>' \(26 of this kind\)"),
        ("fill_in_the_middle", "fim_prefix"),
    ):
        with pytest.raises(
            ValueError, match=rf"^objective.name: '{name}' .*{missing}.*special_tok"
        ):
            transforms.special_ids(ObjectiveConfig(name), 512, lambda name: None, EOS)


def test_a_row_that_hides_all_is_refused():
    with pytest.raises(ValueError, match=r"^data.seq_len: 1 "):
        transform("permutation_lm", seq_len=1)
