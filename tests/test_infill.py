"""Prompts that ask for a middle: laid out as in training, refused elsewhere."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpt_jax.convert.open_model import infill_tokens
from gpt_jax.data.infill_tokens import InfillTokens, known_infill_tokens, trained_infill_tokens
from gpt_jax.data.infilling import rearrange
from gpt_jax.data.tokenizers import byte_tokenizer
from gpt_jax.decode.infill import infill_prompt
from gpt_jax.objectives.config import ObjectiveConfig

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TOKENIZER = byte_tokenizer(NAMES)
SENTINELS = tuple(TOKENIZER.token_id(name) for name in NAMES)
BOTH = InfillTokens(*SENTINELS, ("psm", "spm"))


@pytest.mark.parametrize(("spm_rate", "order"), [(0.0, "psm"), (1.0, "spm")])
def test_a_prompt_is_what_training_shows_before_the_middle(spm_rate, order):
    text = "It was raining, so we stayed."
    ids = np.array(TOKENIZER.encode(text))
    middles = set()
    for seed in range(20):
        rearranged = rearrange(ids, np.random.default_rng(seed), spm_rate, SENTINELS).tolist()
        # The same cuts again, as texts.
        cuts = np.sort(np.random.default_rng(seed).integers(0, len(ids) + 1, 2))
        prefix, middle, suffix = (TOKENIZER.decode(part) for part in np.split(ids, cuts))
        prompt = infill_prompt(TOKENIZER, BOTH, prefix, suffix, order=order)
        assert rearranged == prompt + TOKENIZER.encode(middle)
        middles.add(middle)
    assert len(middles) > 10


def test_the_order_is_the_models_own_and_what_it_is_used_to_comes_first():
    eos = TOKENIZER.eos_id
    psm = infill_prompt(TOKENIZER, BOTH, "a", "b", before=[eos])
    assert psm == [eos, SENTINELS[0], *TOKENIZER.encode("a"), SENTINELS[1],
                   *TOKENIZER.encode("b"), SENTINELS[2]]  # fmt: skip
    only_spm = trained_infill_tokens(SENTINELS, 0.5, 1.0)
    assert infill_prompt(TOKENIZER, only_spm, "a", "b")[1] == SENTINELS[1]
    assert infill_prompt(TOKENIZER, BOTH, "", "") == list(SENTINELS)
    # A text that spells a sentinel does not become one.
    spelled = infill_prompt(TOKENIZER, BOTH, NAMES[1], "")
    assert spelled.count(SENTINELS[1]) == 1


def test_who_was_not_trained_for_it_refuses():
    with pytest.raises(ValueError, match=r"^suffix: this model was not trained"):
        infill_prompt(TOKENIZER, None, "a", "b")
    with pytest.raises(ValueError, match=r"^order: 'spm' is not among the model's, psm"):
        infill_prompt(TOKENIZER, InfillTokens(*SENTINELS), "a", "b", order="spm")


def config_of(name, **values):
    """What matters of a RunConfig."""
    return SimpleNamespace(
        objective=ObjectiveConfig(name=name, **values), model=SimpleNamespace(family="decoder"),
        data=SimpleNamespace(seq_len=16),
    )  # fmt: skip


def test_a_run_says_by_its_objective_whether_it_was():
    trained = infill_tokens(config_of("fill_in_the_middle"), TOKENIZER, imported=False)
    assert trained == BOTH
    one = infill_tokens(
        config_of("fill_in_the_middle", fim_spm_rate=0.0), TOKENIZER, imported=False
    )
    assert one == InfillTokens(*SENTINELS, ("psm",))
    never = infill_tokens(config_of("fill_in_the_middle", fim_rate=0.0), TOKENIZER, imported=False)
    assert never is None
    # The tokenizer has the tokens, but the run did not use them.
    assert infill_tokens(config_of("causal_lm"), TOKENIZER, imported=False) is None
    assert infill_tokens(config_of("causal_lm"), TOKENIZER, imported=True).orders == ("psm",)


@pytest.mark.parametrize(
    ("names", "ends", "orders"),
    [
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_pad>", ("psm", "spm")),
        (("▁<PRE>", "▁<SUF>", "▁<MID>"), "▁<EOT>", ("psm", "spm")),
        (NAMES, "<|fim_pad|>", ("psm",)),
    ],
)
def test_tokens_are_known_by_their_names(names, ends, orders):
    ids = dict(zip((*names, ends), (7, 8, 9, 10), strict=True))
    assert known_infill_tokens(ids.get) == InfillTokens(7, 8, 9, orders, (10,))
    del ids[ends]
    assert known_infill_tokens(ids.get) == InfillTokens(7, 8, 9, orders)
    del ids[names[1]]
    assert known_infill_tokens(ids.get) is None


class _Spaced:
    """A tokenizer of characters that puts a mark before each text, as SentencePiece may do."""

    def encode(self, text):
        return [ord(character) for character in "_" + text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_suffix_does_not_look_like_the_start_of_a_text():
    prompt = infill_prompt(_Spaced(), InfillTokens(1, 2, 3), "ab", "cd")
    assert prompt == [1, *map(ord, "_ab"), 2, *map(ord, "cd"), 3]
