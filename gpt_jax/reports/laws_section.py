"""Laws fitted to the runs of a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt_jax.reports.figures import Figure


@dataclasses.dataclass(frozen=True)
class Laws:
    """What a report shows of laws.

    Attributes:
      markup: Of the section; "": nothing could be fitted.
      figures: In it.
      excluded: {run: why it is not in the fits}.
      refusal: Why nothing was fitted; "" if something was, or nobody would expect it.
    """

    markup: str = ""
    figures: tuple[Figure, ...] = ()
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refusal: str = ""


def laws_section(rows: list[dict[str, Any]], palette: Mapping[str, str]) -> Laws:
    """What laws the runs follow."""
    return Laws()
