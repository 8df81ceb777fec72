"""Rows of the named corpora: split without leaks, parsed from samples of what packages hold."""

# ruff: noqa: RUF001

import ast
import io
import json
import random
import tarfile

import pytest

from gpt_jax.data import corpus_parsers_code as code
from gpt_jax.data import corpus_parsers_tasks as tasks
from gpt_jax.data import corpus_parsers_text as text
from gpt_jax.data.corpus_rows import SPLITS, Row, assign

BOOK = "\n\n".join(f"Paragraph {i} of a book. " + "word " * 40 for i in range(400))


def identities(rows: list[dict]) -> set[str]:
    return {" ".join(row["text"].split()).lower() for row in rows}


def test_no_text_is_in_two_splits_and_order_does_not_matter():
    rng = random.Random(0)
    rows = [Row({"text": f"Text {rng.randrange(300)}"}, f"group {i // 5}") for i in range(1000)]
    rows += [Row({"text": f"text  {i}"}, split="test") for i in range(40)]
    splits, dropped = assign(rows, "text", (0.2, 0.2))
    seen = [identities(splits[split]) for split in SPLITS]
    assert all(seen)
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert set().union(*seen) == identities([row.fields for row in rows])
    assert [len(splits[split]) for split in SPLITS[:2]] == [len(each) for each in seen[:2]]
    assert sum(map(len, splits.values())) + sum(dropped.values()) == len(rows)
    rng.shuffle(rows)
    shuffled, _ = assign(rows, "text", (0.2, 0.2))
    assert [identities(shuffled[split]) for split in SPLITS] == seen


def test_splits_of_the_package_stay_and_train_gives_way():
    rows = [Row({"text": word}, split="train") for word in ["a", "a", "b", "c"]]
    rows += [Row({"text": word}, split="validation") for word in ["b", "d"]]
    rows += [Row({"text": word}, split="test") for word in ["c", "d", "d"]]
    splits, dropped = assign(rows, "text", (0.1, 0.1))
    assert {split: [row["text"] for row in splits[split]] for split in SPLITS} == {
        "train": ["a", "a"],
        "validation": ["b"],
        "test": ["c", "d", "d"],
    }
    assert dropped == {"in_another_split": 3}


def test_shares_and_groups():
    rows = [Row({"text": str(i)}, f"file {i // 10}") for i in range(20_000)]
    splits, _ = assign(rows, "text", (0.1, 0.05))
    share = {split: len(splits[split]) / len(rows) for split in SPLITS}
    assert share == pytest.approx({"train": 0.85, "validation": 0.1, "test": 0.05}, abs=0.02)
    files = [{int(row["text"]) // 10 for row in splits[split]} for split in SPLITS]
    assert sum(map(len, files)) == len(set().union(*files)) == 2000


def test_a_text_with_two_labels_is_dropped():
    rows = [Row({"text": t, "label": x}) for t, x in [("a", "1"), ("A ", "2"), ("b", "1")]]
    splits, dropped = assign(rows, "classification", (0.1, 0.1))
    assert [row["text"] for split in SPLITS for row in splits[split]] == ["b"]
    assert dropped == {"contradictory": 2}


def test_parts_of_a_book_are_the_book():
    parts = text.cut(text.clean(BOOK), 6000)
    assert "\n\n".join(parts) == text.clean(BOOK)
    assert all(part.startswith("Paragraph") for part in parts)
    assert all(4000 < len(part) <= 6000 for part in parts[:-1])
    assert 1500 <= len(parts[-1]) < 8000
    assert text.cut("a" * 50 + "\n\n" + "b" * 60 + "\n\n" + "c" * 9, 100) == [
        "a" * 50,
        "b" * 60 + "\n\n" + "c" * 9,
    ]
    assert text.cut("b" * 95 + "\n\n" + "c" * 9, 100) == ["b" * 95 + "\n\n" + "c" * 9]


def test_clean_text():
    assert text.clean("\ufeffa \r\nb\x02\rc\r\n\r\n\r\n\r\n\r\nd\t\n") == "a\nb\nc\n\n\nd"


def test_poems(tmp_path):
    poem = {"title": "静  夜", "author": "李白", "paragraphs": ["床前明月光，", "疑是地上霜。"]}
    lost = poem | {"paragraphs": ["床前{日/月}明月光，疑是地上霜。"]}
    (tmp_path / "poet.1.json").write_text(json.dumps([poem, lost]))
    (row,) = text.poems(tmp_path)
    assert row.fields["text"] == "静 夜\n李白\n床前明月光，\n疑是地上霜。"
    assert row.group == "床前明月光疑是地上霜"


NEWS = (
    "江/nr  泽民/nr  在/p  北京/ns  会见/v  克林顿/nr  。/w  ”/w  欧阳/nr  海/nr  、/w  江/nr  说/v"
)


def test_chinese_names(tmp_path):
    (tmp_path / "199801.txt").write_text(NEWS + "\n")
    first, second = (row.fields for row in tasks.news_entities(tmp_path))
    assert "".join(first["words"]) == "江泽民在北京会见克林顿。”"
    assert first["tags"] == [
        *("B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O"),
        *("B-PER", "I-PER", "I-PER", "O", "O"),
    ]
    assert second["tags"] == ["B-PER", "I-PER", "I-PER", "O", "B-PER", "O"]
    (document,) = text.news(tmp_path)
    assert document.fields["text"] == "江泽民在北京会见克林顿。”欧阳海、江说"


def test_long_chinese_lines_are_cut_without_loss(tmp_path):
    line = "  ".join(["字/n"] * 50 + ["，/w"]) + "  " + "  ".join(["上海/ns"] * 100)
    (tmp_path / "199801.txt").write_text(line + "\n")
    rows = [row.fields for row in tasks.news_entities(tmp_path)]
    assert all(len(row["words"]) == len(row["tags"]) <= 120 for row in rows)
    assert "".join("".join(row["words"]) for row in rows) == "字" * 50 + "，" + "上海" * 100
    assert all(row["tags"][0] in ("O", "B-LOC") for row in rows)


def test_conll(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(
            f"-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n{name} VBZ B-VP O\n\n. . O O\n"
        )
    rows = list(tasks.conll_entities(tmp_path))
    assert [row.split for row in rows] == [s for s in SPLITS for _ in range(2)]
    assert rows[2].fields == {"words": ["EU", "valid"], "tags": ["B-ORG", "O"]}


def page(*paragraphs: str) -> str:
    return "".join(f'<p id="par_id{i}" {inner}</p>\n' for i, inner in enumerate(paragraphs))


def test_help_pages_are_paired_by_page_and_id(tmp_path):
    variants = (
        '<span class="switchinline"><span hidden="true" id="M" class="MAC"><span>Command</span>'
        '</span><span hidden="true" id="d"><span>Ctrl</span></span></span>'
    )
    english = page(
        f'class="paragraph">Press {variants}&amp;A <br>and hold.',
        'class="paragraph">Only here it stands.',
        'class="code">Print "the same"',
        'class="paragraph">Enter a number.',
    )
    german = page(
        f'class="paragraph">Drücken Sie {variants}&amp;A<br>und halten.',
        'class="paragraph">',
        'class="code">Print "dasselbe"',
        'class="paragraph">' + "Ganz anderer langer Text. " * 4,
    )
    root = tmp_path / "usr/share/libreoffice/help"
    for language, content in (("en-US", english), ("de", german)):
        (root / language / "text/sub").mkdir(parents=True)
        (root / language / "text/sub/page.html").write_text(content)
    (row,) = tasks.help_pages(tmp_path)
    assert row.fields == {
        "source": "Press Ctrl&A and hold.",
        "target": "Drücken Sie Ctrl&A und halten.",
    }
    assert row.group == "sub/page.html"


def test_rated_reviews(tmp_path):
    lines = "1\t2.5\tA ''good'' film &amp; more\n2\t-0.4\tSo so\n3\t-2\tBad\n"
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    info = tarfile.TarInfo(name)
    info.size = len(lines)
    with tarfile.open(tmp_path / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        archive.addfile(info, io.BytesIO(lines.encode()))
    assert [tuple(row.fields.values()) for row in tasks.rated_reviews(tmp_path)] == [
        ('A "good" film & more', "positive"),
        ("Bad", "negative"),
    ]


def test_preferences_keep_the_talk(tmp_path):
    talk = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Why?")]
    rows = [
        {
            "conversations": [{"from": who, "value": said} for who, said in turns],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        }
        for turns in (talk[1:2], talk)
    ]
    (tmp_path / "dpo_en_demo.json").write_text(json.dumps(rows))
    single, whole = (row.fields for row in tasks.preferences(tmp_path))
    assert (single["prompt"], single["chosen"], single["rejected"]) == ("Hi", "good", "bad")
    assert whole["prompt"] == "Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?"
    assert [m["role"] for m in whole["messages"]] == ["system", "user", "assistant", "user"]


SOURCE = '''
"""A module that is long enough to be kept, by a docstring that has no other purpose than that."""
class A:
    @property
    def kept(self, x=1):
        """Says what it does at length."""
        # a comment
        if x:
            return "one"
        return x

    def string_over_lines(self):
        """Says what it does at length."""
        return f(x) + """
        indented"""

    def stub(self):
        """Says what it does at length."""
        raise NotImplementedError

def undocumented():
    return f(1)
'''


def test_functions_are_moved_to_the_left_and_stay_the_same(tmp_path):
    (tmp_path / "a" / "tests").mkdir(parents=True)
    for name in ("a/module.py", "a/tests/module.py", "a/test_module.py"):
        (tmp_path / name).write_text(SOURCE)
    (row,) = code.python_functions(tmp_path)
    assert row.group == row.fields["path"] == "a/module.py"
    assert row.fields["prompt"] == (
        'def kept(self, x=1):\n    """Says what it does at length."""\n'
    )
    assert row.fields["body"].startswith("    # a comment\n    if x:\n")
    ast.parse(row.fields["prompt"] + row.fields["body"])
    (file,) = code.python_files(tmp_path)
    assert file.fields == {"path": "a/module.py", "text": SOURCE.lstrip("\n")}
