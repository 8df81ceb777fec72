"""Parsers of labelled corpora: unpacked folder -> rows of one of the kinds in corpus_rows.py."""

import gzip
import html
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.data.corpus_parsers_text import clean, decode, news_blocks, news_group
from gpt_jax.data.corpus_rows import Row

# Ratings run from -4 to 4; between these the raters themselves saw no side.
_MIN_RATING = 0.5
_SENTENCE_CHARACTERS = 120
_ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
# Two-character surnames; every other one before a given name has one character.
_SURNAMES = {"欧阳", "诸葛", "司马", "令狐", "南宫", "上官", "司徒", "东方", "皇甫", "慕容", "夏侯"}
_STOPS, _COMMAS, _CLOSING = "。！？；", "，；：、", "”’』」）》"  # noqa: RUF001
_MAX_PAIR_CHARACTERS = 400
# By folder of the help: characters to one of English, and what its script has to show.
_LANGUAGES = {"de": (1.15, r"[A-Za-zÄÖÜäöüß]{3}"), "zh-CN": (0.36, r"[\u4e00-\u9fff]")}


def rated_reviews(folder: Path) -> Iterator[Row]:
    """Sentences of film reviews with the mean of twenty people's ratings."""
    archive = next(folder.rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(archive) as opened:
        member = opened.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        lines = member.read().decode("utf-8").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        text = clean(html.unescape(text)).replace("''", '"').strip()
        if text and abs(float(rating)) >= _MIN_RATING:
            yield Row({"text": text, "label": "positive" if float(rating) > 0 else "negative"})


def shop_reviews(folder: Path) -> Iterator[Row]:
    """Chinese reviews, one a line of pos.txt and neg.txt."""
    for name, label in (("neg", "negative"), ("pos", "positive")):
        for line in decode(next(folder.rglob(f"sentiment/{name}.txt"))).splitlines():
            if text := clean(line).strip():
                yield Row({"text": text, "label": label})


def newsgroups(folder: Path) -> Iterator[Row]:
    """Posts of 20newsgroups-{train,test}.tab: three lines of header, then label, tab, text."""
    for split in ("train", "test"):
        path = next(folder.rglob(f"20newsgroups-{split}.tab"))
        for line in decode(path).splitlines()[3:]:
            label, _, text = line.partition("\t")
            if text := text.strip().strip('"'):
                given = split if split == "test" else ""
                yield Row({"text": text, "label": label}, split=given)


def headlines(folder: Path) -> Iterator[Row]:
    """Headlines that are sarcastic or not."""
    for line in decode(next(folder.rglob("samples.jsonl"))).splitlines():
        sample = json.loads(line)
        label = {"0": "not_sarcastic", "1": "sarcastic"}[sample["ideal"]]
        yield Row({"text": clean(sample["input"][-1]["content"]), "label": label})


def conll_entities(folder: Path) -> Iterator[Row]:
    """Sentences of CoNLL-2003 in the splits it came with; the tags are BIO."""
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        for block in re.split(r"\n\s*\n", clean(decode(next(folder.rglob(f"{name}.txt"))))):
            lines = [line.split() for line in block.splitlines() if line.strip()]
            words, tags = [line[0] for line in lines], [line[-1] for line in lines]
            if words and words[0] != "-DOCSTART-":
                yield Row({"words": words, "tags": tags}, split=split)


def news_entities(folder: Path) -> Iterator[Row]:
    """The People's Daily by sentence: characters as words, BIO tags of names."""
    for number, lines in enumerate(news_blocks(folder)):
        for line in lines:
            for sentence in _sentences(_merge_names(line)):
                characters, tags = [], []
                for word, tag in sentence:
                    entity = _ENTITIES.get(tag)
                    characters += word
                    rest = [f"I-{entity}"] * (len(word) - 1)
                    tags += [f"B-{entity}", *rest] if entity else ["O"] * len(word)
                yield Row({"words": characters, "tags": tags}, news_group(number))


def _merge_names(line: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Joins a surname and the given name after it, which are tagged apart."""
    merged, i = [], 0
    while i < len(line):
        word, tag = line[i]
        i += 1
        if tag == "nr" and (len(word) == 1 or word in _SURNAMES):
            run = [w for w, _ in line[i : i + 3]]
            names = next((k for k in range(len(run)) if line[i + k][1] != "nr"), len(run))
            if names:
                word += run[0]
                i += 1
            if names == 2 and [len(w) for w in (word, run[1])] == [2, 2]:  # a married name
                word += run[1]
                i += 1
        merged.append((word, tag))
    return merged


def _sentences(line: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Cuts a line of (word, tag) after full stops, and after commas where it is still long."""
    current, size, ended = [], 0, False
    for word, tag in line:
        if ended and word not in _CLOSING:
            yield current
            current, size, ended = [], 0, False
        if size + len(word) > _SENTENCE_CHARACTERS:
            commas = [k for k, (w, t) in enumerate(current) if t == "w" and w in _COMMAS]
            end = commas[-1] + 1 if commas else len(current)
            yield current[:end]
            current = current[end:]
            size = sum(len(w) for w, _ in current)
        current.append((word, tag))
        size += len(word)
        ended = ended or (tag == "w" and word in _STOPS)
    if current:
        yield current


def help_pages(folder: Path) -> Iterator[Row]:
    """Paragraphs of LibreOffice's help in English and one other language, paired by page and id."""
    english = folder / "usr/share/libreoffice/help/en-US/text"
    (other,) = (path for path in english.parents[1].iterdir() if path.name != "en-US")
    ratio, script = _LANGUAGES[other.name]
    for path in sorted(english.rglob("*.html")):
        page = path.relative_to(english)
        if not (other / "text" / page).exists():
            continue
        targets = _paragraphs(other / "text" / page)
        for name, source in _paragraphs(path).items():
            target = targets.get(name, "")
            if (
                source != target
                and len(source.split()) >= 2
                and re.search("[a-z]{3}", source)
                and re.search(script, target)
                and max(len(source), len(target)) <= _MAX_PAIR_CHARACTERS
                # Paragraphs that changed in one language only are far from the usual length.
                and 1 / 3 < len(target) / len(source) / ratio < 3
            ):
                yield Row({"source": source, "target": target}, page.as_posix())


_PARAGRAPH = re.compile(r'<(p|h\d) id="((?:par|hd)_[^"]+)"([^>]*)>(.*?)</\1>', re.S)


def _paragraphs(path: Path) -> dict[str, str]:
    """Text by id of the paragraphs that are prose."""
    found = {}
    for _, name, attributes, inner in _PARAGRAPH.findall(decode(path)):
        if not re.search(r'class="[^"]*(code|input)', attributes):
            found.setdefault(name, _visible_text(inner))
    return found


def _visible_text(markup: str) -> str:
    """The text between tags, without the variants for one system or one program."""
    pieces, hidden = [], 0  # how deep we are in spans of a hidden one
    for piece in re.split(r"(<[^>]*>)", markup):
        if not piece.startswith("<"):
            pieces += [] if hidden else [piece]
        elif hidden:
            hidden += piece.startswith("<span") - piece.startswith("</span")
        elif piece.startswith("<span") and 'hidden="true"' in piece and 'class="' in piece:
            hidden = 1
        elif piece.startswith("<br"):
            pieces.append(" ")
    return " ".join(clean(html.unescape("".join(pieces))).split())


def instructions(folder: Path) -> Iterator[Row]:
    """Instruction, input and output as one question and its answer."""
    for row in json.loads(decode(next(folder.rglob("alpaca_*_demo.json")))):
        question = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        if question.strip() and row["output"].strip():
            messages = [("user", question.strip()), ("assistant", row["output"].strip())]
            yield Row({"messages": [{"role": r, "content": c} for r, c in messages]})


def preferences(folder: Path) -> Iterator[Row]:
    """A question, and the better and the worse answer to it.

    `messages` is the talk so far with its roles; `prompt` is the same as one text: the question
    alone, or after what the system was told, or a talk with the speakers' names.
    """
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for row in json.loads(decode(next(folder.rglob("dpo_*_demo.json")))):
        turns = [(roles[turn["from"]], turn["value"].strip()) for turn in row["conversations"]]
        chosen, rejected = row["chosen"]["value"].strip(), row["rejected"]["value"].strip()
        several = any(role == "assistant" for role, _ in turns)
        lines = [
            f"{role.capitalize()}: {text}" if several and role != "system" else text
            for role, text in turns
        ]
        prompt = "\n\n".join(line for line in lines if line)
        if prompt and chosen and rejected and chosen != rejected:
            messages = [{"role": role, "content": text} for role, text in turns if text]
            answers = {"chosen": chosen, "rejected": rejected}
            yield Row({"prompt": prompt, **answers, "messages": messages})


def human_eval(folder: Path) -> Iterator[Row]:
    """The 164 problems with their tests, all of them for testing."""
    data = gzip.decompress(next(folder.rglob("HumanEval.jsonl.gz")).read_bytes()).decode()
    for line in data.splitlines():
        if line.strip():
            problem = json.loads(line)
            text = problem["prompt"] + problem["canonical_solution"]
            yield Row(problem | {"text": text}, split="test")
