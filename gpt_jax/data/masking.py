"""Masked language modelling (BERT, arXiv:1810.04805, section 3.1).  n tokens of a row."""

import numpy as np

from gpt_jax.data.segments import make_record


def masked_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_rate: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    ordinary_ids: np.ndarray,
    eos_id: int,
) -> dict[str, np.ndarray]:
    """Chooses tokens to be predicted, and hides most of them.

    Each ordinary token is chosen by itself with probability `mask_rate`. Of the chosen ones
    `mask_share` become the mask token, `random_share` a random ordinary token (it may be the same),
    and the rest stays, so that the model has to judge every token it sees.

    Args:
      tokens: int[n].
      rng: The only source of chance.
      mask_rate: Share of the tokens that are chosen.
      mask_share: Share of the chosen that becomes the mask token.
      random_share: Share of the chosen that becomes a random token.
      mask_id: The mask token.
      ordinary_ids: int[m], sorted: what may be chosen and what random tokens are drawn from.
      eos_id: What begins a document.

    Returns:
      A record. Targets are the original tokens, `loss_mask` is 1 at the chosen ones, and all
      tokens of a document see each other.
    """
    place = np.minimum(np.searchsorted(ordinary_ids, tokens), len(ordinary_ids) - 1)
    chosen = (ordinary_ids[place] == tokens) & (rng.random(len(tokens)) < mask_rate)
    fate = rng.random(len(tokens))
    random = chosen & (mask_share <= fate) & (fate < mask_share + random_share)
    corrupted = np.where(chosen & (fate < mask_share), mask_id, tokens)
    corrupted = np.where(random, rng.choice(ordinary_ids, len(tokens)), corrupted)
    # Documents are those of the original: no chosen token begins one, no random one is special.
    everyone = np.zeros(len(tokens))
    return make_record(corrupted, tokens, chosen, eos_id, key_ranks=everyone, query_ranks=everyone)
