"""Fill in the middle (arXiv:2207.14255): a causal model learns to write between two texts.

Two random cuts make a document prefix, middle, suffix; it is rearranged, a sentinel before each
part, so that the middle comes last:

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

(SPM is the paper's variant, section 3, in which one model learns both orders.) The cuts fall on
tokens, not on characters as in the paper: rows are tokens here.
"""

import numpy as np

from gpt_jax.data.segments import make_record, split_row


def rearrange(
    body: np.ndarray, rng: np.random.Generator, fim_spm_rate: float, sentinels: tuple[int, int, int]
) -> np.ndarray:
    """A document of m tokens, rearranged: int[m + 3].

    Args:
      body: int[m], without its end-of-text token.
      rng: The only source of chance.
      fim_spm_rate: How often it is SPM.
      sentinels: ids of <prefix>, <suffix>, <middle>.
    """
    before, after, between = ([token] for token in sentinels)
    prefix, middle, suffix = np.split(body, np.sort(rng.integers(0, len(body) + 1, 2)))
    if rng.random() < fim_spm_rate:
        parts = before, after, suffix, between, prefix, middle
    else:
        parts = before, prefix, after, suffix, between, middle
    return np.concatenate(parts).astype(body.dtype)


def fill_in_the_middle(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    fim_rate: float,
    fim_spm_rate: float,
    sentinels: tuple[int, int, int],
    eos_id: int,
) -> dict[str, np.ndarray]:
    """Rearranges some documents of a row ("context-level" in the paper).

    A document that the row cuts off is rearranged as it is. The sentinels make the row longer; it
    is cut to its old length.

    Args:
      row: int[n + 1]: the inputs and the last one's target.
      rng: The only source of chance.
      fim_rate: Share of the documents that are rearranged.
      fim_spm_rate: Of those, the share in the order SPM.
      sentinels: ids of <prefix>, <suffix>, <middle>.
      eos_id: What begins a document.

    Returns:
      A record of n tokens with a loss on every target, as in the paper.
    """
    pieces = []
    for document in split_row(row, eos_id):
        head = int(document[0] == eos_id)
        if len(document) > head and rng.random() < fim_rate:
            body = rearrange(document[head:], rng, fim_spm_rate, sentinels)
            document = np.concatenate([document[:head], body])
        pieces.append(document)
    longer = np.concatenate(pieces)[: len(row)]
    return make_record(longer[:-1], longer[1:], np.ones(len(row) - 1), eos_id)
