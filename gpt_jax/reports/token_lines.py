"""Tokens as lines of text: borders, marks, colours, numbers beneath, wrapped to a width."""

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax.data.tokenizers import Tokenizer

# What is to be predicted stands between these. No text or code is likely to hold them.
OPEN, CLOSE = "⟦", "⟧"
BORDER = "·"
TARGET, CORRUPTED, DIM = "target", "corrupted", "dim"
_ANSI = {TARGET: "4;32", CORRUPTED: "31", DIM: "2"}  # green and underlined, red, faint
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})
_BROKEN = "\ufffd"
# A character of UTF-8 has at most so many bytes, and so tokens.
_MOST_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Page:
    """Where lines are shown.

    Attributes:
      width: Columns.
      colour: Whether ANSI escapes may be written.
    """

    width: int = 100
    colour: bool = False

    def paint(self, text: str, style: str = "") -> str:
        """The text in a style of this file; "": as it is."""
        return f"\033[{_ANSI[style]}m{text}\033[0m" if self.colour and style else text


class Cell(NamedTuple):
    """One token, or several that make one character.

    Attributes:
      spans: Texts and their styles, one behind the other.
      beneath: What stands under it, one a line.
    """

    spans: tuple[tuple[str, str], ...]
    beneath: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Without styles."""
        return "".join(text for text, _ in self.spans)


def visible(text: str) -> str:
    """The text with its line breaks and other controls as signs."""
    shown = text.translate(_VISIBLE)
    return "".join(c if unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in shown)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], kinds: Sequence) -> list[tuple[str, int, int]]:
    """Texts of tokens, one by one: (text, first, past the last).

    Tokens that are parts of one character stand together, where they are of one kind.

    Args:
      tokenizer: Its `token_text` is what is shown.
      ids: int[n].
      kinds: [n], tokens of different kinds are never put together.
    """
    found, start = [], 0
    while start < len(ids):
        text, stop = tokenizer.token_text(ids[start]), start + 1
        for end in range(start + 2, min(start + _MOST_BYTES, len(ids)) + 1):
            if _BROKEN not in text or any(kinds[i] != kinds[start] for i in range(start, end)):
                break
            whole = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            if _BROKEN not in whole:
                text, stop = whole, end
        found.append((visible(text), start, stop))
        start = stop
    return found


def text_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    narrow = [c for c in text if not unicodedata.combining(c)]
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in narrow)


def wrap(cells: Sequence[Cell], page: Page, labels: Sequence[str], indent: str) -> list[str]:
    """Lines of cells with a border between two; a line of cells has what is beneath under it.

    Args:
      cells: All with len(labels) - 1 texts beneath.
      page: Where they are shown.
      labels: At the left of the cells' lines, and of the lines beneath.
      indent: Before everything.
    """
    margin = max(map(text_width, labels)) + 2
    room = max(page.width - len(indent) - margin, 8)
    chunks: list[list[tuple[str, Cell, int]]] = [[]]
    used = 0
    before = OPEN + CLOSE  # nothing has a border before it at the start
    for cell in cells:
        border = "" if before.endswith(CLOSE) or cell.text.startswith(OPEN) else BORDER
        size = _size(border, cell)
        if chunks[-1] and used + size > room:
            chunks.append([])
            # A line begins with a border, or the space of a token would look like the margin's.
            border = "" if cell.text.startswith(OPEN) else BORDER
            used, size = 0, _size(border, cell)
        chunks[-1].append((border, cell, size))
        before = cell.text
        used += size
    lines = []
    for number, chunk in enumerate(chunks):
        heads = labels if not number or len(labels) > 1 else [""]
        heads = [head + " " * (margin - text_width(head)) for head in heads]
        chunk[-1] = (*chunk[-1][:2], 0)  # nothing is filled at the end of a line
        lines.append(indent + heads[0] + "".join(_shown(*entry, page) for entry in chunk))
        for i, head in enumerate(heads[1:]):
            numbers = (
                " " * len(b) + cell.beneath[i].ljust(size - len(b)) for b, cell, size in chunk
            )
            lines.append(page.paint(indent + head + "".join(numbers).rstrip(), DIM))
    return lines


def _size(border: str, cell: Cell) -> int:
    """Columns of a cell; numbers beneath it do not touch the next ones."""
    beneath = (len(border) + text_width(text) + 1 for text in cell.beneath)
    return max(text_width(border + cell.text), *beneath, 0)


def _shown(border: str, cell: Cell, size: int, page: Page) -> str:
    text = "".join(page.paint(text, style) for text, style in cell.spans)
    fill = " " * (size - text_width(border + cell.text)) if cell.beneath else ""
    return (page.paint(border, DIM) if border else "") + text + fill
