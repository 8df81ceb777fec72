"""Published laws to stand beside measured ones, each with where its constants were read.

Not here are the constants of Zhang's joint law (arXiv:2402.17193): they differ by task and were not
re-read. What it claims is laws.JointLaw, with a larger exponent for the size of the model than for
the pretraining data.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from gpt_jax.scaling.laws import (
    ParamDataLaw,
    RepeatedDataLaw,
    TransferLaw,
    UnifiedTransferLaw,
)
from gpt_jax.scaling.optima import fit_power

UNVERIFIED = "unverified: written down from memory, not re-read"


@dataclasses.dataclass(frozen=True)
class Published:
    """A law, its source, how its numbers are counted, and whether the constants were re-read."""

    law: Any
    source: str
    counts: str
    mark: str


CHINCHILLA = ParamDataLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
_TEXT_TO_PYTHON = TransferLaw(k=1.9e4, alpha=0.18, beta=0.38)
_MUENNIGHOFF = ParamDataLaw(
    E=math.exp(0.6254804),
    A=math.exp(6.255414),
    B=math.exp(7.3049974),
    alpha=0.3526596,
    beta=0.3526596,
)

PUBLISHED = {
    "chinchilla": Published(CHINCHILLA, "arXiv:2203.15556", "all parameters, tokens", UNVERIFIED),
    "chinchilla_refit": Published(
        ParamDataLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
        "arXiv:2404.10102",
        "all parameters, tokens",
        "re-read in the code of arXiv:2406.12907, which uses them",
    ),
    "repeated_data": Published(
        RepeatedDataLaw(_MUENNIGHOFF, data_half=15.3878, params_half=5.3097),
        "arXiv:2305.16264",
        "all parameters, tokens",
        "re-read in the authors' repository",
    ),
    "text_to_python": Published(
        _TEXT_TO_PYTHON,
        "arXiv:2102.01293",
        "non-embedding parameters, characters",
        UNVERIFIED + "; the form is confirmed by arXiv:2408.16947",
    ),
    "text_and_code_to_python": Published(
        TransferLaw(k=2.1e5, alpha=0.096, beta=0.38),
        "arXiv:2102.01293",
        "non-embedding parameters, characters",
        UNVERIFIED,
    ),
    "kaplan_text_to_python": Published(
        UnifiedTransferLaw(
            _TEXT_TO_PYTHON, params_scale=6.4e13, data_scale=1.8e13, alpha_n=0.076, alpha_d=0.103
        ),
        "arXiv:2102.01293 with the constants of arXiv:2001.08361 for text",
        "non-embedding parameters; the data scale is in tokens of text, so only the form compares",
        UNVERIFIED,
    ),
}


def transfer_table(measured: TransferLaw) -> list[dict[str, Any]]:
    """Rows of D_T = k D_F^alpha N^beta: the measured law, then published ones with their marks."""
    rows = [{"name": "measured", **dataclasses.asdict(measured), "counts": "", "mark": "measured"}]
    for name, entry in PUBLISHED.items():
        if isinstance(entry.law, TransferLaw):
            constants = dataclasses.asdict(entry.law)
            rows.append({"name": name, **constants, "counts": entry.counts, "mark": entry.mark})
    return rows


def non_embedding_exponent(
    law: ParamDataLaw,
    embedding_scale: float = 47491.0,
    sizes: tuple[float, float, int] = (10**2.9, 10**9.2, 20),
    budgets: tuple[float, float, int] = (10**12.95, 10**20.7, 100),
) -> float:
    """The exponent of the best size for a budget where only non-embedding parameters are counted.

    arXiv:2406.12907 explains Kaplan's 0.73 so. A model of N non-embedding parameters has
    N_T = N + 47491 N^(1/3) in all; the law holds for N_T, while budgets C = 6 N D leave embeddings
    out. Of the sizes the best is taken at every budget, and a line laid through their logarithms.
    With the published ranges and "chinchilla_refit" it is 0.775 (published 0.78), where counting
    all parameters gives 0.51.

    Args:
      law: Of all parameters.
      embedding_scale: Of N^(1/3).
      sizes: Smallest and largest N, and how many.
      budgets: Smallest and largest C, and how many.
    """
    num_params = np.geomspace(*sizes)
    flops = np.geomspace(*budgets)
    total = num_params + embedding_scale * num_params ** (1 / 3)
    loss = law.predict(total, flops[:, None] / (6 * num_params))
    return fit_power(flops, num_params[loss.argmin(1)]).p
