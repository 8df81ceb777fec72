"""Parsers of the corpora for pretraining: unpacked folder -> rows with a "text"."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.data.corpus_rows import Row

_DOCUMENT_BYTES = 6000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
# Lines of the newspaper's tagged file to a document; about an article or a few.
NEWS_LINES = 40


def books(folder: Path) -> Iterator[Row]:
    """Books and plays, one a .txt file, in parts of about 6 kB that begin at a paragraph.

    Parts, so that a share of every book can be held out.
    """
    for path in sorted(folder.rglob("*.txt")):
        name = path.stem.removesuffix("_gut")
        for number, part in enumerate(cut(clean(decode(path)), _DOCUMENT_BYTES)):
            yield Row({"text": part, "book": name, "part": number}, f"{name}/{number}")


def speeches(folder: Path) -> Iterator[Row]:
    """One address a file, all of it on one line."""
    for path in sorted(folder.rglob("*.txt")):
        text = clean(html.unescape(decode(path)))
        yield Row({"text": text, "name": path.stem}, path.stem)


def poems(folder: Path) -> Iterator[Row]:
    """Poems as title, author and lines; two editions of one poem are one group."""
    for path in sorted(folder.rglob("*.json")):
        for poem in json.loads(decode(path)):
            lines = poem.get("paragraphs") or poem.get("content") or poem.get("para") or []
            body = clean("\n".join(lines))
            # "{..}" spells a character that has no code point, "□" stands for one that is lost.
            if len(body) < 8 or re.search(r"[{}□\ufffd\ue000-\uf8ff]|無正文|无正文", body):
                continue
            title = " ".join((poem.get("title") or poem.get("rhythmic") or "").split())
            author = " ".join((poem.get("author") or "").split())
            text = "\n".join(part for part in (title, author, body) if part)
            yield Row({"text": text}, re.sub(r"\W", "", body))


def news(folder: Path) -> Iterator[Row]:
    """The People's Daily without its tags, forty lines a document."""
    for number, lines in enumerate(news_blocks(folder)):
        text = "\n".join("".join(word for word, _ in line) for line in lines)
        yield Row({"text": text}, news_group(number))


def news_blocks(folder: Path) -> Iterator[list[list[tuple[str, str]]]]:
    """Blocks of lines of (word, tag)."""
    path = next(folder.rglob("199801.txt"))
    lines = [
        [tuple(token.rsplit("/", 1)) for token in line.split()]
        for line in decode(path).splitlines()
        if line.strip()
    ]
    for start in range(0, len(lines), NEWS_LINES):
        yield lines[start : start + NEWS_LINES]


def news_group(number: int) -> str:
    """The group of block `number`, which text and entities of the newspaper share."""
    return f"199801/{number}"


def decode(path: Path) -> str:
    """A file's text: UTF-8, or else Windows' Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def clean(text: str) -> str:
    """One kind of line end, no control characters, no space at line ends, no wide gaps."""
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"[ \t]+\n", "\n", _CONTROL.sub("", text) + "\n")
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def cut(text: str, size: int) -> list[str]:
    """Parts of about `size` characters that end at empty lines; a last short one joins its
    neighbour."""
    parts, current = [], ""
    for paragraph in re.split(r"(?<=\n)\n+", text):
        if current and len(current) + len(paragraph) > size:
            parts.append(current)
            current = ""
        current += ("\n" if current else "") + paragraph
    if current and parts and len(current) < size // 4:
        parts[-1] += "\n" + current
    elif current:
        parts.append(current)
    return [part.strip("\n") for part in parts]
